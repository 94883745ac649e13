//! The demo's report, in the shape that the README documents.

use serde::{Deserialize, Serialize};

use crate::{iperf, silence};

/// What `migrate --output json` ends with: the parts that the report uses. The service may say more.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct MigrationReport {
    /// Pod.
    pub pod: String,
    /// Source node.
    pub from: String,
    /// Destination node.
    pub to: String,
    /// `precopy`, for now.
    pub mode: String,
    /// How it ended.
    pub outcome: Outcome,
    /// From the request to the release of the source's VM.
    pub total_ms: f64,
    /// From the source's stop to the destination's resume.
    pub downtime_ms: f64,
    /// Microseconds of Unix time; 0 if it never froze.
    pub frozen_at_unix_us: u64,
    /// Memory figures.
    pub memory: Memory,
    /// Packet figures.
    pub packets: Packets,
    /// Microseconds of each step of the downtime.
    #[serde(default)]
    pub phases: Vec<(String, u64)>,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result", content = "reason")]
pub enum Outcome {
    /// The destination runs the guest.
    Completed,
    /// The destination did not take it; the source runs it, as before.
    Refused(String),
    /// The source runs it, as before.
    Failed(String),
}

/// Memory figures of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Guest RAM.
    pub bytes_ram: u64,
    /// Page bytes sent.
    pub bytes_sent: u64,
    /// Rounds, the first pass and the last one included.
    pub rounds: u32,
    /// Pages compared by hash before the grant.
    pub pages_verified: u64,
    /// Of these, those that differed.
    pub mismatched: u64,
    /// What the guest waited for after its resume; absent if it lacked nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faults: Option<Faults>,
}

/// Waits for pages after the resume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// Pages that were missing at the resume.
    pub missing: u64,
    /// Waits.
    pub count: u64,
    /// Half of them were shorter, in microseconds.
    pub p50_us: u64,
    /// 99 in 100 were shorter.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
    /// Pages that were not the source's; only compared with `--verify`.
    pub mismatched: u64,
}

/// The ledger of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Packets {
    /// Frames that a gate saw.
    pub seen: u64,
    /// Frames handed to the guest.
    pub delivered: u64,
    /// Frames still held.
    pub held: u64,
    /// Of the delivered ones, those that came through the source's relay.
    pub forwarded: u64,
    /// Frames lost.
    pub lost: u64,
}

/// One move in the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Migration {
    /// Pod.
    pub pod: String,
    /// Source node.
    pub from: String,
    /// Destination node.
    pub to: String,
    /// `precopy`, for now.
    pub mode: String,
    /// `completed`, or `failed: ` and the reason.
    pub outcome: String,
    /// From the request to the release of the source's VM.
    pub total_ms: f64,
    /// From the source's stop to the destination's resume.
    pub downtime_ms: f64,
    /// Longest silence that the probe saw around the switchover.
    pub blackout_ms: f64,
    /// Memory figures.
    pub memory: Memory,
    /// The ledger.
    pub packets: Packets,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The moves, in order.
    pub migrations: Vec<Migration>,
    /// The UDP probe.
    pub probe: silence::Summary,
    /// The TCP stream.
    pub iperf3: iperf::Summary,
}

impl Migration {
    /// Joins what the service and the probe saw.
    pub fn new(report: &MigrationReport, blackout_ms: f64) -> Migration {
        Migration {
            pod: report.pod.clone(),
            from: report.from.clone(),
            to: report.to.clone(),
            mode: report.mode.clone(),
            outcome: match &report.outcome {
                Outcome::Completed => "completed".to_owned(),
                Outcome::Refused(reason) => format!("refused: {reason}"),
                Outcome::Failed(reason) => format!("failed: {reason}"),
            },
            total_ms: report.total_ms,
            downtime_ms: report.downtime_ms,
            blackout_ms,
            memory: report.memory,
            packets: report.packets,
        }
    }
}

impl Report {
    /// What is not as it must be; empty if everything is. `verify` says whether pages were to be compared.
    pub fn defects(&self, moves: usize, verify: bool) -> Vec<String> {
        let mut defects = Vec::new();
        let mut must = |holds: bool, text: String| {
            if !holds {
                defects.push(text);
            }
        };
        must(
            self.migrations.len() == moves,
            format!("{} of {moves} moves were made", self.migrations.len()),
        );
        for migration in &self.migrations {
            let name = format!("{} -> {}", migration.from, migration.to);
            must(
                migration.outcome == "completed",
                format!("{name}: {}", migration.outcome),
            );
            must(
                migration.packets.lost == 0,
                format!("{name}: the ledger lost {}", migration.packets.lost),
            );
            must(
                migration.packets.held == 0,
                format!("{name}: {} packets are still held", migration.packets.held),
            );
            must(
                migration.memory.mismatched == 0,
                format!("{name}: {} pages differ", migration.memory.mismatched),
            );
            must(
                !verify || migration.memory.pages_verified > 0,
                format!("{name}: no page was compared"),
            );
        }
        let probe = &self.probe;
        must(probe.received > 0, "the probe had no answer".to_owned());
        must(probe.lost == 0, format!("the probe lost {}", probe.lost));
        must(
            probe.duplicated == 0,
            format!("the probe had {} duplicates", probe.duplicated),
        );
        must(
            probe.reordered == 0,
            format!("the probe saw {} out of order", probe.reordered),
        );
        must(
            self.iperf3.connection_survived,
            format!(
                "iperf3's connection did not survive: {}",
                self.iperf3
                    .error
                    .as_deref()
                    .unwrap_or("no data after the last move")
            ),
        );
        defects
    }

    /// The closing summary.
    pub fn table(&self) -> String {
        let mut text = String::from(
            "  move      outcome     total ms  downtime ms  blackout ms  sent MiB  rounds  verified  differ      seen  delivered  forwarded  lost\n",
        );
        for m in &self.migrations {
            text += &format!(
                "  {:<9} {:<10} {:>9.0} {:>12.1} {:>12.1} {:>9.1} {:>7} {:>9} {:>7} {:>9} {:>10} {:>10} {:>5}\n",
                format!("{} -> {}", m.from, m.to),
                m.outcome,
                m.total_ms,
                m.downtime_ms,
                m.blackout_ms,
                m.memory.bytes_sent as f64 / 1_048_576.0,
                m.memory.rounds,
                m.memory.pages_verified,
                m.memory.mismatched,
                m.packets.seen,
                m.packets.delivered,
                m.packets.forwarded,
                m.packets.lost,
            );
        }
        let (p, i) = (&self.probe, &self.iperf3);
        text += &format!(
            "  UDP probe  sent {}, received {}, lost {}, duplicated {}, reordered {}, longest silence {:.1} ms, round trip at most {:.1} ms\n",
            p.sent,
            p.received,
            p.lost,
            p.duplicated,
            p.reordered,
            p.longest_silence_ms,
            p.longest_round_trip_ms
        );
        text += &format!(
            "  iperf3     {:.1} s, {:.1} Mbit/s, {} retransmits, the connection {}\n",
            i.seconds,
            i.mbits_per_s,
            i.retransmits,
            if i.connection_survived {
                "survived"
            } else {
                "BROKE"
            }
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the service writes it, fields that the report does not use included.
    const FROM_SERVICE: &str = r#"{"id":"00","pod":"demo","from":"a","to":"b","mode":"precopy","outcome":{"result":"completed"},
        "total_ms":900.5,"downtime_ms":21.25,"frozen_at_unix_us":1000,
        "memory":{"bytes_ram":268435456,"bytes_sent":5,"rounds":3,"pages_verified":65536,"mismatched":0},
        "packets":{"seen":10,"delivered":9,"held":0,"forwarded":2,"refused":1,"lost":0},"phases":[["stop",600]]}"#;

    fn report() -> Report {
        let service: MigrationReport = serde_json::from_str(FROM_SERVICE).unwrap();
        Report {
            migrations: vec![Migration::new(&service, 30.0)],
            probe: silence::Summary {
                sent: 2,
                received: 2,
                longest_silence_ms: 30.0,
                longest_round_trip_ms: 31.0,
                ..Default::default()
            },
            iperf3: iperf::Summary {
                seconds: 1.0,
                mbits_per_s: 99.0,
                retransmits: 0,
                connection_survived: true,
                error: None,
            },
        }
    }

    #[test]
    fn the_report_has_the_documented_shape() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "migrations": [{
                    "pod": "demo", "from": "a", "to": "b", "mode": "precopy", "outcome": "completed",
                    "total_ms": 900.5, "downtime_ms": 21.25, "blackout_ms": 30.0,
                    "memory": { "bytes_ram": 268435456, "bytes_sent": 5, "rounds": 3, "pages_verified": 65536, "mismatched": 0 },
                    "packets": { "seen": 10, "delivered": 9, "held": 0, "forwarded": 2, "lost": 0 },
                }],
                "probe": { "sent": 2, "received": 2, "lost": 0, "duplicated": 0, "reordered": 0, "longest_silence_ms": 30.0, "longest_round_trip_ms": 31.0 },
                "iperf3": { "seconds": 1.0, "mbits_per_s": 99.0, "retransmits": 0, "connection_survived": true },
            })
        );
    }

    #[test]
    fn a_clean_report_has_no_defects_and_each_figure_can_make_one() {
        assert_eq!(report().defects(1, true), [""; 0]);
        assert_eq!(report().defects(2, true).len(), 1);
        let changes: [fn(&mut Report); 9] = [
            |r| r.migrations[0].outcome = "failed: x".into(),
            |r| r.migrations[0].packets.lost = 1,
            |r| r.migrations[0].packets.held = 1,
            |r| r.migrations[0].memory.mismatched = 1,
            |r| r.migrations[0].memory.pages_verified = 0,
            |r| r.probe.lost = 1,
            |r| r.probe.duplicated = 1,
            |r| r.probe.reordered = 1,
            |r| r.iperf3.connection_survived = false,
        ];
        for change in changes {
            let mut changed = report();
            change(&mut changed);
            assert_eq!(changed.defects(1, true).len(), 1, "{changed:?}");
        }
    }

    #[test]
    fn a_failed_migration_says_why() {
        let text = FROM_SERVICE.replace(
            r#"{"result":"completed"}"#,
            r#"{"result":"failed","reason":"link lost"}"#,
        );
        let service: MigrationReport = serde_json::from_str(&text).unwrap();
        assert_eq!(Migration::new(&service, 0.0).outcome, "failed: link lost");
    }
}
