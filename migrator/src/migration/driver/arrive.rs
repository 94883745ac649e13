//! Sessions that other nodes dial: a new migration, or a source that comes back after a lost link.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::destination::Run;
use super::destination_pages::missing_file;
use super::link::{Link, LinkEvent};
use super::runner::Side;
use super::steps::{blocking_journal, owner_to_go_on};
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::memory::receive::Target;
use crate::migration::destination::{Destination, Input};
use crate::migration::journal::DestinationRecord;
use crate::network::Stage;
use crate::pods::{PodHandle, PodResources};
use crate::wire::bulk::{Data, Urgent};
use crate::wire::conn::Connection;
use crate::wire::fault::Fault;
use crate::wire::id::MigrationId;
use crate::wire::lists::{Gathered, ImageList};
use crate::wire::message::{Bye, Control, Ledger, Offer, QueryReply, Refuse, RefuseCode};
use crate::wire::session::Session;

/// For the first message of a session.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// For each piece of the images' lists.
const NEXT_PIECE: Duration = Duration::from_secs(10);

/// The machines of this node that await a source which lost its link, by migration.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    running: Arc<Mutex<HashMap<MigrationId, Machine>>>,
    /// Guests that lack pages, until their machines are there.
    paged: Arc<Mutex<HashMap<MigrationId, Paged>>>,
}

/// A machine that runs.
#[derive(Debug)]
struct Machine {
    pod: String,
    /// Closed when the machine is done.
    relink: UnboundedSender<Relinked>,
}

/// A guest that is being paged, and the end of who does it.
#[derive(Debug)]
struct Paged {
    target: Arc<OnceLock<Target>>,
    end: CancellationToken,
}

/// A session of a source that came back, with its first message.
#[derive(Debug)]
pub(super) struct Relinked {
    pub(super) link: Link,
    pub(super) events: UnboundedReceiver<LinkEvent>,
    pub(super) urgent: Option<Connection<Urgent>>,
    pub(super) data: Vec<Connection<Data>>,
    pub(super) faults: Vec<Connection<Fault>>,
    pub(super) version: u16,
    pub(super) first: Control,
}

impl Arrivals {
    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Machine>> {
        // Every change is one call on the map.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod's machine takes sources that come back from here on.
    pub(super) fn enter(
        &self,
        migration: MigrationId,
        pod: &str,
        relink: UnboundedSender<Relinked>,
    ) {
        let pod = pod.to_owned();
        let machine = Machine { pod, relink };
        self.running().insert(migration, machine);
    }

    /// No longer.
    pub(super) fn leave(&self, migration: MigrationId) {
        self.running().remove(&migration);
    }

    /// Until no machine of this pod runs any more: its old node has let go of it, or nobody knows whether it has.
    pub(super) async fn over(&self, pod: &str) {
        let of = |machine: &&Machine| machine.pod == pod;
        loop {
            let machine = self.running().values().find(of).map(|m| m.relink.clone());
            match machine {
                Some(machine) => machine.closed().await,
                None => return,
            }
        }
    }

    /// A guest lacks pages, and its machine is not there yet: what its source says comes out of the channel, until the token is
    /// cancelled.
    pub(super) fn page(
        &self,
        migration: MigrationId,
        pod: &str,
        target: &Arc<OnceLock<Target>>,
    ) -> (UnboundedReceiver<Relinked>, CancellationToken) {
        let (relink, asked) = unbounded_channel();
        self.enter(migration, pod, relink);
        let end = CancellationToken::new();
        let paged = Paged {
            target: Arc::clone(target),
            end: end.clone(),
        };
        self.paged().insert(migration, paged);
        (asked, end)
    }

    /// Whether a guest is being paged whose machine is not there yet.
    pub fn is_paged(&self, migration: MigrationId) -> bool {
        self.paged().contains_key(&migration)
    }

    fn paged(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Paged>> {
        self.paged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a session that another node dialed.
pub(super) async fn incoming(node: Arc<Node>, session: Session) {
    let Session {
        peer,
        control,
        data,
        urgent,
        faults,
        version,
        ..
    } = session;
    let (sender, mut events) = unbounded_channel();
    let link = Link::start(control, sender, Some);
    let first = match timeout(FIRST_MESSAGE, events.recv()).await {
        Ok(Some(LinkEvent::Message(message))) => message,
        Ok(Some(LinkEvent::Lost(reason))) => {
            tracing::info!(peer, reason, "a session ended before it began");
            return;
        }
        Ok(None) | Err(_) => {
            tracing::warn!(peer, "a session said nothing");
            return;
        }
    };
    match first {
        Control::Offer(offer) => {
            if offer.source != peer || urgent.is_none() || data.is_empty() {
                tracing::warn!(
                    peer,
                    source = offer.source,
                    "an offer that its certificate does not fit, or without data connections"
                );
                return;
            }
            let lists = match lists_of(&offer, &mut events).await {
                Ok(lists) => lists,
                Err(reason) => {
                    tracing::warn!(peer, pod = offer.pod.name, reason, "refused a pod");
                    let reason = format!("{}: {reason}", node.name());
                    let code = RefuseCode::Image;
                    // It may be gone.
                    let _ = link.control.send(Refuse { code, reason }).await;
                    let _ = link.control.flush().await;
                    return;
                }
            };
            // Before that nobody knows which names and addresses are taken.
            node.found.cancelled().await;
            let mut run = Run::new(node, Destination::new(offer.clone(), peer));
            run.offer = Some(offer);
            run.lists = lists;
            run.take_link(link, events);
            run.urgent = urgent;
            run.faults = faults;
            run.version = version;
            run.lanes = data.len();
            run.receive(data);
            run.input(Input::Begin).await;
            run.events().await;
        }
        first @ (Control::Query(_) | Control::Released(_)) => {
            let asked = Relinked {
                link,
                events,
                urgent,
                data,
                faults,
                version,
                first,
            };
            question(&node, peer, asked).await;
        }
        other => tracing::warn!(
            peer,
            message = other.name(),
            "a session began with an unexpected message"
        ),
    }
}

/// The lists of the offer's images, where they follow it.
async fn lists_of(
    offer: &Offer,
    events: &mut UnboundedReceiver<LinkEvent>,
) -> Result<Vec<ImageList>, String> {
    let Some(lists) = &offer.lists else {
        return Ok(Vec::new());
    };
    let mut gathered = Gathered::new(lists.lengths.clone()).map_err(|error| chain(&error))?;
    while !gathered.is_complete() {
        match timeout(NEXT_PIECE, events.recv()).await {
            Ok(Some(LinkEvent::Message(Control::ListPiece(piece)))) => {
                gathered.take(&piece).map_err(|error| chain(&error))?;
            }
            Ok(Some(LinkEvent::Message(other))) => {
                return Err(format!(
                    "the lists of the images are not complete, and {} came: the peer is broken or of another version",
                    other.name()
                ));
            }
            Ok(Some(LinkEvent::Lost(reason))) => return Err(reason),
            Ok(None) | Err(_) => {
                return Err("the lists of the images do not come to their end".to_owned());
            }
        }
    }
    Ok(gathered.finish())
}

fn subject(message: &Control) -> Option<MigrationId> {
    match message {
        Control::Query(query) => Some(query.migration),
        Control::Released(released) => Some(released.migration),
        _ => None,
    }
}

/// A source asks after its link was lost: the machine that runs answers, or else the journal.
pub(super) async fn question(node: &Arc<Node>, peer: String, asked: Relinked) {
    let Some(id) = subject(&asked.first) else {
        return;
    };
    let known = node.arrivals.running().contains_key(&id);
    if !known {
        node.found.cancelled().await;
    }
    let machine = node.arrivals.running().get(&id).map(|m| m.relink.clone());
    let mut asked = match machine {
        Some(machine) => match machine.send(asked) {
            Ok(()) => return,
            // It ended in this moment: the journal has its last word.
            Err(mpsc::error::SendError(asked)) => asked,
        },
        None => asked,
    };
    if missing_file(node, id).exists() {
        // Only the machine that is about to be there can say what the guest lacks; the source asks again.
        tracing::info!(peer, migration = %id, "asked too early");
        return;
    }
    let mut next = Some(asked.first);
    while let Some(message) = next.take() {
        let answer = match message {
            Control::Query(query) => {
                let peer = peer.clone();
                let verdict =
                    blocking_journal(node, move |journal| journal.answer(query.migration, &peer))
                        .await;
                verdict.map(|verdict| {
                    Some(Control::QueryReply(QueryReply {
                        migration: query.migration,
                        verdict,
                        wants_pages: false,
                    }))
                })
            }
            Control::Released(released) => {
                let peer = peer.clone();
                let settled = blocking_journal(node, move |journal| {
                    journal.settle(released.migration, &peer)
                })
                .await;
                settled.map(|()| {
                    Some(Control::Bye(Bye {
                        migration: released.migration,
                        ledger: Ledger::default(),
                    }))
                })
            }
            _ => Ok(None),
        };
        match answer {
            Ok(Some(answer)) => {
                if asked.link.control.send(answer).await.is_err() {
                    return;
                }
            }
            Ok(None) => {}
            Err(reason) => {
                tracing::error!(peer, reason, "cannot answer who runs a pod");
                return;
            }
        }
        next = match asked.events.recv().await {
            Some(LinkEvent::Message(message)) => Some(message),
            Some(LinkEvent::Lost(_)) | None => None,
        };
    }
}

/// Ends a migration to here that an earlier service left open after the grant.
pub(super) async fn recover(
    node: Arc<Node>,
    record: DestinationRecord,
    pod: Option<(PodHandle, Arc<PodResources>)>,
) {
    let Some(owner) = owner_to_go_on(&node, &record.pod).await else {
        return;
    };
    tracing::info!(
        pod = record.pod,
        from = record.from,
        "going on with a pod that was granted to this node"
    );
    if let Some((_, resources)) = &pod
        && resources.port.stage() == Stage::Opened
        && let Err(error) = resources.port.reopen().await
    {
        tracing::error!(
            pod = record.pod,
            error = chain(&error),
            "the network is not told that it lives here"
        );
    }
    let paged = node.arrivals.paged().remove(&record.migration);
    let (machine, first) = Destination::recover(0, record, owner, pod.is_some(), paged.is_some());
    let mut run = Run::new(node, machine);
    if let Some(Paged { target, end }) = paged {
        run.target = target;
        // The source loses its link, and dials this machine.
        end.cancel();
    }
    run.found = pod;
    run.watch_vm();
    run.carry_out(first).await;
    run.events().await;
}
