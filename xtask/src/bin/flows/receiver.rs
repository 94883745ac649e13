//! In the pod that moves: books what arrives, and sends it back.

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use crate::kind::{Kind, Packet, STREAM_PORT};
use crate::sockets::{self, Own};
use crate::streams::Streams;
use crate::tally::Tally;
use crate::{Role, counters, now_us, patiently};

#[derive(Default)]
struct Books {
    /// Packets of another run are of no interest.
    run: u64,
    flows: BTreeMap<(u16, Kind), Tally>,
}

pub(crate) struct Receiver {
    books: Mutex<Books>,
    streams: Arc<Streams>,
}

/// Opens everything, and starts to receive.
pub(crate) fn open(own: Own) -> Result<Arc<dyn Role>, String> {
    let receiver = Arc::new(Receiver {
        books: Mutex::default(),
        streams: Arc::default(),
    });
    for kind in Kind::ALL {
        let what = format!("cannot receive {}", kind.name());
        let socket = patiently(&what, || sockets::receiver(kind, own))?;
        let receiver = Arc::clone(&receiver);
        std::thread::spawn(move || receiver.receive(&socket, kind));
    }
    for address in [own.v4.into(), own.v6.into()] {
        let address: std::net::IpAddr = address;
        let listener = patiently("cannot take streams", || {
            TcpListener::bind((address, STREAM_PORT))
        })?;
        let streams = Arc::clone(&receiver.streams);
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let streams = Arc::clone(&streams);
                std::thread::spawn(move || streams.answer(socket));
            }
        });
    }
    Ok(receiver)
}

impl Receiver {
    fn receive(&self, socket: &UdpSocket, kind: Kind) {
        let mut buffer = vec![0; 65536];
        loop {
            // An error belongs to one packet (an ICMP answer to an earlier one).
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            let at_us = now_us();
            let Some((packet, right)) =
                sockets::unwrap(kind, &buffer[..length], false).and_then(Packet::decode)
            else {
                continue;
            };
            {
                let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
                if packet.run != books.run {
                    continue;
                }
                let flow = books.flows.entry((packet.sender, kind)).or_default();
                flow.add(packet.number, right && packet.kind == kind, at_us);
            }
            if !kind.is_echo() {
                let answer = Packet {
                    answer: true,
                    ..packet
                };
                // What cannot be sent is a loss that the sender sees.
                let _ = socket.send_to(&answer.encode(), from);
            }
        }
    }
}

impl Role for Receiver {
    fn order(&self, words: &[&str]) -> String {
        match words {
            ["start", run] => {
                let run = run.parse().unwrap_or(0);
                *self.books.lock().unwrap_or_else(PoisonError::into_inner) = Books {
                    run,
                    ..Books::default()
                };
                "{}".to_owned()
            }
            ["stats"] => {
                let books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
                let flows: Vec<String> = books
                    .flows
                    .iter()
                    .map(|((sender, kind), tally)| {
                        format!(
                            r#"{{"sender":{sender},"kind":{},"tally":{}}}"#,
                            kind.index(),
                            tally.json()
                        )
                    })
                    .collect();
                format!(
                    r#"{{"flows":[{}],"streams":{},"counters":{}}}"#,
                    flows.join(","),
                    self.streams.json(),
                    counters::json()
                )
            }
            _ => r#"{"error":"unknown order"}"#.to_owned(),
        }
    }
}
