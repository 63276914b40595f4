{{- define "datasync.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "datasync.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* The table of services. */}}
{{- define "datasync.table" -}}
{{ .Files.Get "files/services.yaml" }}
{{- end }}

{{- define "datasync.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/name: datasync
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: datasync
{{- end }}

{{- /* The labels that select the pods of a component: dict "root" "component". */}}
{{- define "datasync.selector" -}}
app.kubernetes.io/name: datasync
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* defaults, overridden by what services.<name> says: dict "root" "service". */}}
{{- define "datasync.values" -}}
{{- $own := index .root.Values.services .service.name | default dict -}}
{{- toYaml (mergeOverwrite (deepCopy .root.Values.defaults) (deepCopy $own)) -}}
{{- end }}

{{- define "datasync.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "datasync.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "datasync.bundledMongodb" -}}
{{- if and .Values.mongodb.bundled (not .Values.mongodb.url) (not (hasPrefix "mongodb" .Values.database.url)) }}true{{ end }}
{{- end }}

{{- define "datasync.bundledKafka" -}}
{{- if and .Values.kafka.enabled (not .Values.kafka.bootstrapServers) }}true{{ end }}
{{- end }}

{{- define "datasync.kafkaServers" -}}
{{- if .Values.kafka.enabled }}{{ .Values.kafka.bootstrapServers | default (printf "%s-kafka:9092" (include "datasync.name" .)) }}{{ end }}
{{- end }}

{{- /* database.url with database.username and database.password in it. */}}
{{- define "datasync.databaseUrl" -}}
{{- $url := .Values.database.url -}}
{{- if and $url .Values.database.username -}}
{{- $parts := splitn "://" 2 $url -}}
{{- $user := .Values.database.username | urlquery | replace "+" "%20" -}}
{{- if .Values.database.password }}{{ $user = printf "%s:%s" $user (.Values.database.password | urlquery | replace "+" "%20") }}{{ end -}}
{{ $parts._0 }}://{{ $user }}@{{ $parts._1 }}
{{- else -}}
{{ $url }}
{{- end -}}
{{- end }}

{{- /* The Secret with a setting: the chart's if its values give the setting, else existingSecret: dict "root" "key". */}}
{{- define "datasync.secretOf" -}}
{{- $given := dict "API_KEY" .root.Values.apiKey "DB_URL" .root.Values.database.url "MONGODB_URL" (or .root.Values.mongodb.url (include "datasync.bundledMongodb" .root)) -}}
{{- if and .root.Values.existingSecret (not (index $given .key)) -}}
{{ .root.Values.existingSecret }}
{{- else -}}
{{ include "datasync.name" .root }}-settings
{{- end -}}
{{- end }}

{{- define "datasync.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "datasync.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Spread over nodes and zones: dict "root" "component". */}}
{{- define "datasync.spread" -}}
{{- if .root.Values.topologySpread }}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: {{ if eq $key "kubernetes.io/hostname" }}{{ $.root.Values.topologySpread }}{{ else }}ScheduleAnyway{{ end }}
    labelSelector:
      matchLabels: {{- include "datasync.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end }}
