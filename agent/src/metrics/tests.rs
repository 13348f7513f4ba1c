use std::net::SocketAddr;

use super::*;
use crate::proxy::Failure;
use crate::proxy::testing;

fn key() -> WorkloadKey {
    WorkloadKey { namespace: "shop".into(), name: "web".into() }
}

fn metrics() -> Arc<Metrics> {
    let events: KernelEvents = Arc::new(|| vec![(Reason::Captured, 7)]);
    Arc::new(Metrics::new(testing::snapshots(testing::snapshot([])).1, events))
}

fn record(metrics: &Arc<Metrics>, direction: Direction) -> ConnRecord {
    let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
    ConnRecord::accepted(metrics.clone(), direction, key(), addr("10.0.0.1:1000"), addr("10.0.0.2:80"))
}

fn has(metrics: &Metrics, line: &str) -> bool {
    metrics.encode().unwrap().lines().any(|l| l == line)
}

#[test]
fn a_refused_connection_is_counted_once_and_not_as_closed() {
    let metrics = metrics();
    record(&metrics, Direction::Inbound).finish(Err(Reason::NotTls.into()));
    let labels = r#"{direction="inbound",workload="shop/web",reason="not_tls"}"#;
    assert!(has(&metrics, &format!("sealane_connections_refused_total{labels} 1")), "{}", metrics.encode().unwrap());
    assert!(!metrics.encode().unwrap().contains("sealane_connections_closed_total{"));
}

#[test]
fn a_carried_connection_is_opened_counted_live_and_closed_once() {
    let metrics = metrics();
    let mut record = record(&metrics, Direction::Outbound);
    record.opened(Carried::Plaintext);
    record.traffic.add(Side::App, 3);
    record.traffic.add(Side::App, 4);
    let labels = r#"direction="outbound",workload="shop/web""#;
    assert!(has(&metrics, &format!("sealane_connections_open{{{labels}}} 1")));
    assert!(has(&metrics, &format!(r#"sealane_connections_opened_total{{{labels},mode="plaintext"}} 1"#)));
    assert!(has(&metrics, &format!(r#"sealane_plaintext_connections_total{{{labels},port="80"}} 1"#)));
    assert!(has(&metrics, &format!(r#"sealane_bytes_total{{{labels},side="app"}} 7"#)));
    record.finish(Ok::<_, Failure>(()));
    assert!(has(&metrics, &format!("sealane_connections_open{{{labels}}} 0")));
    assert!(has(&metrics, &format!(r#"sealane_connections_closed_total{{{labels},reason="done"}} 1"#)));
    assert_eq!(metrics.encode().unwrap().matches("sealane_connections_closed_total{").count(), 1);
}

#[test]
fn a_dropped_record_ends_as_aborted() {
    let metrics = metrics();
    drop(record(&metrics, Direction::Inbound));
    let labels = r#"{direction="inbound",workload="shop/web",reason="aborted"}"#;
    assert!(has(&metrics, &format!("sealane_connections_refused_total{labels} 1")));
}

#[test]
fn what_the_kernel_counted_is_asked_at_each_scrape() {
    assert!(has(&metrics(), r#"sealane_kernel_events_total{reason="captured"} 7"#));
}

#[test]
fn a_forgotten_workload_leaves_no_series() {
    let metrics = metrics();
    for direction in [Direction::Inbound, Direction::Outbound] {
        for mode in [Carried::Mtls, Carried::Plaintext, Carried::Hairpin] {
            let mut record = record(&metrics, direction);
            record.opened(mode);
            record.finish(Err(Reason::PolicyChanged.into()));
        }
        record(&metrics, direction).finish(Err(Reason::NotAllowed.into()));
    }
    assert!(metrics.encode().unwrap().contains("shop/web"));
    metrics.forget(&key());
    assert!(!metrics.encode().unwrap().contains("shop/web"));
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_connections_end_is_one_line_of_the_access_log() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let mut record = record(&metrics(), Direction::Outbound);
        record.endpoint = Some("10.0.0.9:8080".parse().unwrap());
        record.peer_id = Some("spiffe://td/api".parse().unwrap());
        record.tls =
            Some(TlsFacts { version: rustls::ProtocolVersion::TLSv1_3, group: rustls::NamedGroup::X25519MLKEM768 });
        record.opened(Carried::Mtls);
        record.traffic.add(Side::Peer, 5);
        let source = Some(std::io::Error::other("two\nlines"));
        record.finish(Err(Failure { reason: Reason::RefusedByPeer, alert: Some("access_denied"), source }));
    });
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["target"], &line["level"]), (&"access".into(), &"INFO".into()));
    let expected = [
        ("direction", "outbound"),
        ("workload", "shop/web"),
        ("client", "10.0.0.1:1000"),
        ("destination", "10.0.0.2:80"),
        ("endpoint", "10.0.0.9:8080"),
        ("mode", "mtls"),
        ("peer_id", "spiffe://td/api"),
        ("tls", "TLSv1_3"),
        ("group", "X25519MLKEM768"),
        ("outcome", "refused_by_peer"),
        ("alert", "access_denied"),
        ("message", "the peer refused us with a TLS alert"),
    ];
    for (field, value) in expected {
        assert_eq!(line["fields"][field], value, "{field}");
    }
    assert_eq!((&line["fields"]["bytes_from_app"], &line["fields"]["bytes_from_peer"]), (&0.into(), &5.into()));
    assert!(line["fields"].get("local_id").is_none());
}
