import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.time.OffsetDateTime;
import java.util.List;
import java.util.Properties;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.internals.BuiltInPartitioner;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;

/**
 * A program of somebody else's that follows a topic with the stock client. It prints one line of JSON for each message:
 * where it stood, its CloudEvents attributes, its fields, and the partition that this client would have chosen.
 */
public final class TopicReader {
    private static final ObjectMapper JSON = new ObjectMapper();

    /** Arguments: bootstrap servers, topic, how many messages to read. */
    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        properties.put("bootstrap.servers", arguments[0]);
        properties.put("group.id", "somebody-else");
        properties.put("auto.offset.reset", "earliest");
        int wanted = Integer.parseInt(arguments[2]);
        try (var consumer =
                new KafkaConsumer<>(properties, new ByteArrayDeserializer(), new ByteArrayDeserializer())) {
            int partitions = consumer.partitionsFor(arguments[1]).size();
            consumer.subscribe(List.of(arguments[1]));
            long deadline = System.nanoTime() + Duration.ofSeconds(30).toNanos();
            while (wanted > 0 && System.nanoTime() < deadline) {
                for (var record : consumer.poll(Duration.ofMillis(200))) {
                    System.out.println(JSON.writeValueAsString(described(record, partitions)));
                    wanted--;
                }
            }
        }
        System.exit(wanted > 0 ? 1 : 0);
    }

    private static ObjectNode described(ConsumerRecord<byte[], byte[]> record, int partitions) throws Exception {
        ObjectNode line = JSON.createObjectNode();
        line.put("partition", record.partition());
        line.put("default_partition", BuiltInPartitioner.partitionForKey(record.key(), partitions));
        line.put("key", new String(record.key(), StandardCharsets.UTF_8));
        ObjectNode headers = line.putObject("headers");
        for (Header header : record.headers()) {
            headers.put(header.key(), new String(header.value(), StandardCharsets.UTF_8));
        }
        line.put("epoch_ms", OffsetDateTime.parse(headers.get("ce_time").asText()).toInstant().toEpochMilli());
        line.set("data", JSON.readTree(record.value()));
        return line;
    }
}
