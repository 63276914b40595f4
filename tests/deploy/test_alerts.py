"""Every alert fires when it should, and its text says what is wrong: tried with ``promtool``."""

import shutil
from pathlib import Path

import pytest
import yaml

from deploy.testing.cluster import run

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deploy/compose/prometheus/prometheus.yml"
ALERTS = ROOT / "helm/datasync/files/alerts.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on the PATH (Debian's package: prometheus)"
)

# For each alert: a series, its samples once a minute for an hour, the labels of the alert, and its summary.
FIRING: dict[str, tuple[str, str, dict[str, str], str]] = {
    "DataSyncConsumerStopped": (
        "datasync_consumer_stopped", "1x60", {"component": "auth", "topic": "t"}, "auth has stopped following t",
    ),
    "DataSyncRelayStopped": (
        "datasync_relay_stopped", "1x60", {"component": "auth"}, "auth has stopped publishing its events",
    ),
    "DataSyncMessagesParked": (
        "datasync_consumer_parked_messages", "3x60", {"component": "auth"}, "3 messages could not be handled by auth",
    ),
    "DataSyncConsumerLags": (
        "datasync_consumer_lag_seconds", "61x60", {"component": "auth", "topic": "t"}, "auth is 1m 1s behind t",
    ),
    "DataSyncRelayLags": (
        "datasync_relay_lag_events", "10001x60", {"component": "auth"}, "10001 events of auth are not published",
    ),
    "DataSyncRunsWait": (
        "datasync_runs_oldest_wait_seconds", "301x60", {}, "A run has waited for a worker for 5m 1s",
    ),
    "DataSyncRunsFail": (
        "datasync_runs_finished_total", "0x40 3x20", {}, "3 runs failed within 30 minutes",
    ),
    "DataSyncUpstreamUnavailable": (
        "datasync_gateway_upstream_unavailable_total", "0+60x60", {"service": "auth"},
        "Requests fail because auth does not answer",
    ),
    "DataSyncRateLimitsLocal": (
        "datasync_gateway_rate_limits_local", "1x60", {}, "A gateway can't reach MongoDB and limits by itself",
    ),
    "DataSyncCommitsSlow": (
        "datasync_batch_commit_duration_seconds_bucket", "0+60x60", {"component": "auth"},
        "99 % of the commits of auth take up to 1.98s",
    ),
}  # fmt: skip
# Labels of the series that the alert does not keep.
EXTRA_LABELS = {"DataSyncRunsFail": ['outcome="failed"']}


def test_the_alerts_and_the_configuration_pass_promtool(tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.read_text().replace("/etc/prometheus/alerts.yaml", str(ALERTS)))
    assert f"SUCCESS: {len(RULES)} rules found" in run("promtool", "check", "config", "--lint-fatal", str(config))


def test_every_alert_fires_and_says_what_is_wrong(tmp_path: Path) -> None:
    assert FIRING.keys() == {rule["alert"] for rule in RULES}
    tests = [unit_test(rule["alert"], rule["labels"], rule["annotations"]["description"]) for rule in RULES]
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": tests}))
    run("promtool", "test", "rules", str(tmp_path / "test.yaml"))


def unit_test(alert: str, own_labels: dict[str, str], description: str) -> dict[str, object]:
    """As promtool reads it."""
    metric, samples, labels, summary = FIRING[alert]
    given = [f'{name}="{value}"' for name, value in labels.items()] + EXTRA_LABELS.get(alert, [])
    limits = [[f'le="{limit}"'] for limit in ("2", "+Inf")] if metric.endswith("_bucket") else [[]]
    expected = {
        "exp_labels": {**labels, **own_labels},
        "exp_annotations": {"summary": summary, "description": description},
    }
    return {
        "interval": "1m",
        "input_series": [
            {"series": f"{metric}{{{','.join([*given, *limit])}}}", "values": samples} for limit in limits
        ],
        "alert_rule_test": [{"eval_time": "1h", "alertname": alert, "exp_alerts": [expected]}],
    }
