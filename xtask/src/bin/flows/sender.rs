//! Outside, and in the pods that stay: sends numbered packets of every kind, and books the answers.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::kind::{Kind, Packet, SHARES};
use crate::sockets::{self, Own};
use crate::streams::Streams;
use crate::tally::Tally;
use crate::{Role, counters, now_us, patiently};

/// Longest sleep, so that an order is carried out soon.
const NAP: Duration = Duration::from_millis(100);
/// When each so-many-th packet left is remembered, to tell the time of a loss.
const MARKED: u64 = 16;

/// One kind.
struct Flow {
    kind: Kind,
    socket: UdpSocket,
    sent: AtomicU64,
    refused: Mutex<(u64, String)>,
    /// Microseconds of Unix time of every [`MARKED`]th packet.
    left_us: Mutex<Vec<u64>>,
    answers: Mutex<Tally>,
}

pub(crate) struct Sender {
    own: Own,
    to: Own,
    number: u16,
    /// Packets a second, over all kinds.
    rate: u32,
    run: AtomicU64,
    stop: Arc<AtomicBool>,
    flows: Vec<Flow>,
    streams: Arc<Streams>,
}

/// Opens everything; packets are sent once told to.
pub(crate) fn open(
    own: Own,
    to: Own,
    kinds: &[Kind],
    (number, rate): (u16, u32),
) -> Result<Arc<dyn Role>, String> {
    let mut flows = Vec::new();
    for kind in kinds {
        let kind = *kind;
        let what = format!("cannot send {}", kind.name());
        flows.push(Flow {
            kind,
            socket: patiently(&what, || sockets::sender(kind, own))?,
            sent: AtomicU64::new(0),
            refused: Mutex::default(),
            left_us: Mutex::default(),
            answers: Mutex::default(),
        });
    }
    let sender = Arc::new(Sender {
        own,
        to,
        number,
        rate: rate.max(1),
        run: AtomicU64::new(0),
        stop: Arc::default(),
        flows,
        streams: Arc::default(),
    });
    for index in 0..sender.flows.len() {
        let sender = Arc::clone(&sender);
        std::thread::spawn(move || sender.receive(&sender.flows[index]));
    }
    Ok(Arc::new(Orders(sender)))
}

impl Sender {
    fn start(self: &Arc<Self>, run: u64) -> Result<(), String> {
        if self.run.swap(run, Ordering::Relaxed) != 0 {
            return Err("it has started already".to_owned());
        }
        for (index, to) in [self.to.v4.into(), self.to.v6.into()]
            .into_iter()
            .enumerate()
        {
            let connection = run ^ (u64::from(self.number) << 8 | index as u64);
            self.streams
                .begin(to, connection, &self.stop)
                .map_err(|error| format!("no stream to {to}: {error}"))?;
        }
        let mut targets = Vec::new();
        for flow in &self.flows {
            let target = sockets::target(flow.kind, self.own, self.to);
            targets.push(target.map_err(|error| error.to_string())?);
        }
        let sender = Arc::clone(self);
        std::thread::spawn(move || {
            let began = Instant::now();
            let intervals: Vec<Duration> = sender
                .flows
                .iter()
                .map(|flow| Duration::from_secs(1) * SHARES / (sender.rate * flow.kind.share()))
                .collect();
            let mut due: Vec<Instant> = intervals.iter().map(|gap| began + *gap).collect();
            while !sender.stop.load(Ordering::Relaxed) {
                let now = Instant::now();
                for (index, flow) in sender.flows.iter().enumerate() {
                    if due[index] <= now {
                        sender.send(flow, &targets[index]);
                        // Not what was missed while this guest stood still: that would be a burst.
                        due[index] = (due[index] + intervals[index]).max(now);
                    }
                }
                let next = due.iter().min().copied().unwrap_or(now);
                std::thread::sleep(next.saturating_duration_since(Instant::now()).min(NAP));
            }
        });
        Ok(())
    }

    fn send(&self, flow: &Flow, target: &std::net::SocketAddr) {
        let number = flow.sent.load(Ordering::Relaxed);
        let packet = Packet {
            kind: flow.kind,
            answer: false,
            sender: self.number,
            run: self.run.load(Ordering::Relaxed),
            number,
        };
        let bytes = sockets::wrap(flow.kind, self.number, number, packet.encode());
        match flow.socket.send_to(&bytes, target) {
            Ok(_) => {
                if number.is_multiple_of(MARKED) {
                    let mut left = flow.left_us.lock().unwrap_or_else(PoisonError::into_inner);
                    left.push(now_us());
                }
                flow.sent.store(number + 1, Ordering::Relaxed);
            }
            Err(error) => {
                let mut refused = flow.refused.lock().unwrap_or_else(PoisonError::into_inner);
                *refused = (refused.0 + 1, error.to_string());
            }
        }
    }

    fn receive(&self, flow: &Flow) {
        let mut buffer = vec![0; 65536];
        loop {
            // An error belongs to one packet (an ICMP answer to an earlier one).
            let received: io::Result<usize> = flow.socket.recv(&mut buffer);
            let Ok(length) = received else {
                continue;
            };
            let at_us = now_us();
            let Some((packet, right)) =
                sockets::unwrap(flow.kind, &buffer[..length], true).and_then(Packet::decode)
            else {
                continue;
            };
            // The raw sockets of ICMP get everybody's.
            if packet.run != self.run.load(Ordering::Relaxed)
                || packet.sender != self.number
                || packet.kind != flow.kind
            {
                continue;
            }
            let mut answers = flow.answers.lock().unwrap_or_else(PoisonError::into_inner);
            answers.add(packet.number, right, at_us);
        }
    }

    fn json(&self) -> String {
        let flows: Vec<String> = self.flows.iter().map(Flow::json).collect();
        format!(
            r#"{{"flows":[{}],"streams":{},"counters":{}}}"#,
            flows.join(","),
            self.streams.json(),
            counters::json()
        )
    }
}

impl Flow {
    fn json(&self) -> String {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self.left_us.lock().unwrap_or_else(PoisonError::into_inner);
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        // Around the first that was not answered.
        let mark = answers.missing.first().map(|number| number / MARKED);
        let left_us = mark.and_then(|mark| left.get(mark as usize).copied());
        format!(
            r#"{{"kind":{},"sent":{},"refused":{},"refusal":"{}","first_missing_left_us":{},"answers":{}}}"#,
            self.kind.index(),
            self.sent.load(Ordering::Relaxed),
            refused.0,
            refused.1.replace(['"', '\\'], "'"),
            left_us.unwrap_or(0),
            answers.json()
        )
    }
}

/// Threads of a sender need it to be shared.
struct Orders(Arc<Sender>);

impl Role for Orders {
    fn order(&self, words: &[&str]) -> String {
        match words {
            ["start", run] => match self.0.start(run.parse().unwrap_or(1)) {
                Ok(()) => "{}".to_owned(),
                Err(text) => format!(r#"{{"error":"{}"}}"#, text.replace(['"', '\\'], "'")),
            },
            ["stop"] => {
                self.0.stop.store(true, Ordering::Relaxed);
                "{}".to_owned()
            }
            ["stats"] => self.0.json(),
            _ => r#"{"error":"unknown order"}"#.to_owned(),
        }
    }
}
