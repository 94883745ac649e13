//! Against a monitor of our own.

use tokio::net::UnixListener;

use super::*;

const SOON: Duration = Duration::from_secs(5);
const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

/// A monitor that greets, then answers each command line as `answer` says.
fn monitor(answer: fn(&str, u64) -> Option<String>) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        write.write_all(GREETING.as_bytes()).await.unwrap();
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let value: Value = serde_json::from_str(&line).unwrap();
            let name = value["execute"].as_str().unwrap().to_owned();
            let id = value["id"].as_u64().unwrap();
            match answer(&name, id) {
                Some(text) => write.write_all(text.as_bytes()).await.unwrap(),
                None => return,
            }
        }
    });
    (dir, path)
}

fn ok(id: u64) -> String {
    format!("{{\"return\": {{}}, \"id\": {id}}}\r\n")
}

#[tokio::test]
async fn a_reply_finds_its_caller_between_events() {
    let (_dir, path) = monitor(|name, id| {
        Some(match name {
            "stop" => format!("{{\"event\": \"STOP\", \"timestamp\": {{}}}}\r\n{}", ok(id)),
            _ => ok(id),
        })
    });
    let qmp = Qmp::connect(&path, SOON).await.unwrap();
    let mut events = qmp.events();
    qmp.execute("stop", Value::Null, SOON).await.unwrap();
    assert_eq!(events.recv().await.unwrap().name, "STOP");
}

#[tokio::test]
async fn an_event_tells_when_it_happened_if_the_clock_could_be_read() {
    let (_dir, path) = monitor(|_, id| {
        let stop =
            "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 1700000000, \"microseconds\": 42}}";
        let resume =
            "{\"event\": \"RESUME\", \"timestamp\": {\"seconds\": -1, \"microseconds\": -1}}";
        Some(format!("{stop}\r\n{resume}\r\n{}", ok(id)))
    });
    let qmp = Qmp::connect(&path, SOON).await.unwrap();
    let mut events = qmp.events();
    qmp.execute("stop", Value::Null, SOON).await.unwrap();
    assert_eq!(
        events.recv().await.unwrap().at_unix_us,
        1_700_000_000_000_042
    );
    assert_eq!(events.recv().await.unwrap().at_unix_us, 0);
}

#[tokio::test]
async fn a_refusal_keeps_class_and_words() {
    let (_dir, path) = monitor(|name, id| {
        Some(match name {
            "cont" => format!(
                "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no\"}}, \"id\": {id}}}\n"
            ),
            _ => ok(id),
        })
    });
    let qmp = Qmp::connect(&path, SOON).await.unwrap();
    match qmp.execute("cont", Value::Null, SOON).await.unwrap_err() {
        QmpError::Refused { class, desc, .. } => {
            assert_eq!((class.as_str(), desc.as_str()), ("GenericError", "no"));
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn silence_is_a_timeout_and_a_late_reply_harms_nobody() {
    let (_dir, path) = monitor(|name, id| {
        Some(match name {
            "slow" => String::new(),
            // The late reply to the command before comes first.
            "next" => format!("{}{}", ok(id - 1), ok(id)),
            _ => ok(id),
        })
    });
    let qmp = Qmp::connect(&path, SOON).await.unwrap();
    let short = Duration::from_millis(20);
    let late = qmp.execute("slow", Value::Null, short).await.unwrap_err();
    assert!(matches!(late, QmpError::Timeout { .. }), "{late}");
    qmp.execute("next", Value::Null, SOON).await.unwrap();
}

#[tokio::test]
async fn a_closed_monitor_is_lost_now_and_later() {
    let (_dir, path) = monitor(|name, id| (name != "quit").then(|| ok(id)));
    let qmp = Qmp::connect(&path, SOON).await.unwrap();
    for _ in 0..2 {
        let lost = qmp.execute("quit", Value::Null, SOON).await.unwrap_err();
        assert!(matches!(lost, QmpError::Lost { .. }), "{lost}");
    }
    assert!(qmp.is_lost());
}

#[tokio::test]
async fn what_does_not_greet_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"{\"hello\": 1}\n").await.unwrap();
    });
    let refused = Qmp::connect(&path, SOON).await.unwrap_err();
    assert!(matches!(refused, QmpError::Greeting { .. }), "{refused}");
    let nobody = Qmp::connect(&dir.path().join("none"), SOON).await;
    assert!(matches!(nobody, Err(QmpError::Connect { .. })));
}
