//! More packets come for a pod on its way than may be kept: nothing of that is silent.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migrator::migration::status::{MigrationReport, Outcome};
use migrator_tests::lab::{POD, POD_IPV4, TestLab};
use xtask::lab::Node;
use xtask::netns;

/// Full frames for the pod, some four megabytes a second: what the test's limit lets in is over in 16 ms.
struct Flood {
    runs: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Flood {
    fn start(test: &TestLab) -> Result<Self> {
        let socket = netns::within(&test.lab().client(), || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect((POD_IPV4, 7002))?;
            Ok(socket)
        })?;
        let runs = Arc::new(AtomicBool::new(true));
        let go_on = Arc::clone(&runs);
        let thread = std::thread::spawn(move || {
            let mut next = Instant::now();
            while go_on.load(Ordering::Acquire) {
                for _ in 0..3 {
                    // Nobody listens there, which the guest may say.
                    let _ = socket.send(&[0; 1400]);
                }
                next += Duration::from_millis(1);
                // Not a wait for anything: this is the pace of the traffic.
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        Ok(Self { runs, thread })
    }

    fn stop(self) -> Result<()> {
        self.runs.store(false, Ordering::Release);
        self.thread.join().ok().context("the flood panicked")
    }
}

#[test]
fn a_pod_with_more_packets_than_may_be_kept_stays_or_is_told_what_it_lost() -> Result<()> {
    let mut test = TestLab::up()?;
    test.restart(Node::A, || {
        let path = test.lab().node_dir(Node::A).join("config.yaml");
        let config = std::fs::read_to_string(&path)?;
        let limits = "limits: { park_bytes_per_pod: 65536 }\n";
        Ok(std::fs::write(&path, config + limits)?)
    })?;
    test.run_pod()?;
    let flood = Flood::start(&test)?;
    let said = test.says(Node::A, &["migrate", POD, "--to", "b", "--verify"])?;
    ensure!(said.code == Some(1), "{said:?}");
    for word in ["park_bytes_per_pod", "--on-overflow drop"] {
        ensure!(said.err.contains(word), "`{word}` is missing: {}", said.err);
    }
    ensure!(said.out.contains("0 lost"), "{said:?}");
    ensure!(!said.out.contains("BOOKS"), "{said:?}");
    super::stayed(&test)?;
    // Not one packet of the probe was lost by that.
    test.probe_is_perfect()?;

    let words = ["--output", "json", "migrate", POD, "--to", "b", "--verify"];
    let words = [&words[..], &["--on-overflow", "drop"]].concat();
    let report: MigrationReport = serde_json::from_str(&test.succeeds(Node::A, &words)?)?;
    flood.stop()?;
    ensure!(report.outcome == Outcome::Completed, "{report:?}");
    let packets = report.packets;
    ensure!(packets.lost_overflow > 0, "{packets:?}");
    ensure!(packets.lost == packets.lost_overflow, "{packets:?}");
    ensure!(packets.unaccounted == 0 && packets.held == 0, "{packets:?}");
    let text = test.succeeds(Node::A, &["status", &report.id])?;
    let line = format!("LOST     {} beyond what may be kept", packets.lost_overflow);
    ensure!(text.contains(&line), "{text}");
    test.runs_on(Node::B)?;
    test.start_probe()?;
    test.end()
}
