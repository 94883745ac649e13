//! Tells one node of this one's pods, and asks it for end markers; dials again when the connection is lost.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use vm_runtime::units::{Epoch, MacAddress};

use super::Directory;
use super::convert::{to_wire, wanted_to_wire};
use crate::api::error::chain;
use crate::network::Claim;
use crate::wire::control::{self, ControlSender};
use crate::wire::message::{Control, Places, PlacesAck};
use crate::wire::preamble::Shape;
use crate::wire::session::{self, Session};

/// For TCP, TLS and the preamble.
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// Before a lost connection is dialed again: at first, and at most; twice as long each time.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// Markers that have not come are asked for again after this.
const AGAIN: Duration = Duration::from_millis(30);
/// For the first acknowledgement: a node that does not answer is not up.
const ANSWER: Duration = Duration::from_secs(5);

pub(super) async fn publish(directory: &Directory, peer: &str, addr: SocketAddr) {
    let mut pause = PAUSE[0];
    let mut said = String::new();
    loop {
        let one = async {
            let dialed =
                session::dial_shape(addr, &directory.tls, peer, Shape::Places, DIAL_DEADLINE).await;
            match dialed {
                Ok(session) => {
                    pause = PAUSE[0];
                    tell(directory, peer, session).await
                }
                Err(error) => chain(&error),
            }
        };
        let reason = tokio::select! {
            reason = one => reason,
            () = directory.shutdown.cancelled() => return,
        };
        // Once for each reason: a node may be away for days.
        if said != reason {
            tracing::warn!(peer, reason, "the node is not told where pods are");
            said.clone_from(&reason);
        }
        directory.endpoints.unreachable(peer, reason);
        tokio::select! {
            () = sleep(pause) => {}
            () = directory.shutdown.cancelled() => return,
        }
        pause = (pause * 2).min(PAUSE[1]);
    }
}

/// What the node at the other end has been told on this connection.
#[derive(Default)]
struct Told {
    claims: BTreeMap<MacAddress, Claim>,
    seq: u64,
    in_flight: VecDeque<(u64, Vec<(MacAddress, Epoch)>)>,
    /// When each departure's markers were asked for.
    asked: BTreeMap<u64, Instant>,
}

impl Told {
    /// What has changed; the first time, everything. A pod that is `elsewhere` by now is not gone: its new node tells of it, and whoever has not heard that yet may send
    /// here.
    fn news(
        &mut self,
        now: Vec<Claim>,
        vni: u32,
        elsewhere: impl Fn(MacAddress) -> bool,
    ) -> Option<Places> {
        let whole = self.seq == 0;
        let now: BTreeMap<_, _> = now.into_iter().map(|claim| (claim.mac, claim)).collect();
        let new = |(mac, claim): &(&MacAddress, &Claim)| self.claims.get(mac) != Some(claim);
        let here: Vec<Claim> = now.iter().filter(new).map(|(_, claim)| *claim).collect();
        let gone = self.claims.keys();
        let gone = gone.filter(|mac| !now.contains_key(mac) && !elsewhere(**mac));
        let gone: Vec<_> = gone.map(|mac| mac.0).collect();
        self.claims = now;
        if !whole && here.is_empty() && gone.is_empty() {
            return None;
        }
        self.seq += 1;
        let claims = here.iter().map(|claim| (claim.mac, claim.epoch)).collect();
        self.in_flight.push_back((self.seq, claims));
        Some(Places {
            seq: self.seq,
            vni,
            whole,
            here: here.iter().map(to_wire).collect(),
            gone,
        })
    }

    fn acknowledged(&mut self, ack: PlacesAck) -> Option<Vec<(MacAddress, Epoch)>> {
        let (seq, claims) = self.in_flight.pop_front()?;
        (seq == ack.seq).then_some(claims)
    }
}

/// Until the connection is lost; returns why.
async fn tell(directory: &Directory, peer: &str, session: Session) -> String {
    let endpoints = &directory.endpoints;
    let (sender, mut receiver) = control::start(session.control);
    let mut changes = endpoints.changes();
    let mut told = Told::default();
    loop {
        changes.borrow_and_update();
        let news = told.news(endpoints.claims(), endpoints.vni(), |mac| {
            endpoints.is_elsewhere(mac)
        });
        let sent = async {
            // Where pods have gone to comes first: who only hears that they are not here any more drops their packets.
            ask_for_markers(directory, peer, &mut told.asked, &sender).await?;
            match news {
                Some(news) => sender.send(news).await,
                None => Ok(()),
            }
        };
        if sent.await.is_err() {
            // The receiver has the cause.
            return match receiver.recv().await {
                Err(error) => chain(&error),
                Ok(message) => format!("lost behind a {}", message.name()),
            };
        }
        let limit = match told.in_flight.is_empty() {
            true => Duration::MAX,
            false => ANSWER,
        };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return "this node's table is gone".to_owned();
            },
            () = sleep(AGAIN), if !told.asked.is_empty() => {}
            answer = timeout(limit, receiver.recv()) => match answer {
                Ok(Ok(Control::PlacesAck(ack))) => match told.acknowledged(ack) {
                    Some(claims) => endpoints.acknowledged(peer, &claims),
                    None => return "it acknowledges what it was not told".to_owned(),
                },
                Ok(Ok(message)) => return format!("it answered with a {}", message.name()),
                Ok(Err(error)) => return chain(&error),
                Err(_) => return format!("it does not take what it is told within {} s", ANSWER.as_secs()),
            },
        }
    }
}

async fn ask_for_markers(
    directory: &Directory,
    peer: &str,
    asked: &mut BTreeMap<u64, Instant>,
    sender: &ControlSender,
) -> Result<(), crate::wire::LinkError> {
    let wanted = directory.endpoints.wanted(peer);
    asked.retain(|nonce, _| wanted.iter().any(|wanted| wanted.nonce == *nonce));
    for wanted in wanted {
        let last = asked.get(&wanted.nonce);
        if last.is_none_or(|last| last.elapsed() >= AGAIN) {
            asked.insert(wanted.nonce, Instant::now());
            sender.send(wanted_to_wire(&wanted)).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(last: u8, epoch: u64) -> Claim {
        Claim {
            mac: MacAddress([0x52, 0x54, 0, 0, 0, last]),
            v4: Some([10, 77, 0, last].into()),
            v6: None,
            epoch: Epoch(epoch),
        }
    }

    const HERE: fn(MacAddress) -> bool = |_| false;

    #[test]
    fn a_pod_that_has_moved_is_not_told_as_gone() {
        let mut told = Told::default();
        told.news(vec![claim(1, 1), claim(2, 1)], 7, HERE).unwrap();
        let moved = |mac| mac == claim(1, 1).mac;
        assert_eq!(told.news(vec![claim(2, 1)], 7, moved), None);
        let stopped = told.news(Vec::new(), 7, HERE).unwrap();
        assert_eq!(stopped.gone, [claim(2, 1).mac.0]);
    }

    #[test]
    fn the_first_message_has_everything_and_the_next_ones_what_has_changed() {
        let mut told = Told::default();
        let first = told.news(Vec::new(), 7, HERE).unwrap();
        assert!(first.whole && first.here.is_empty());
        assert_eq!(told.news(Vec::new(), 7, HERE), None);
        let second = told.news(vec![claim(1, 1), claim(2, 1)], 7, HERE).unwrap();
        assert_eq!((second.seq, second.whole, second.here.len()), (2, false, 2));
        let third = told.news(vec![claim(2, 3)], 7, HERE).unwrap();
        assert_eq!(third.here, [to_wire(&claim(2, 3))]);
        assert_eq!(third.gone, [claim(1, 1).mac.0]);
        assert_eq!(told.acknowledged(PlacesAck { seq: 1 }), Some(Vec::new()));
        assert_eq!(
            told.acknowledged(PlacesAck { seq: 3 }),
            None,
            "out of order"
        );
    }
}
