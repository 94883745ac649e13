//! Takes what another node tells, and answers it with end markers.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::convert::{from_wire, wanted_from_wire};
use crate::api::error::chain;
use crate::network::{Claim, Endpoints};
use crate::wire::control;
use crate::wire::message::{Control, EndWanted, Places, PlacesAck};
use crate::wire::session::Session;
use vm_runtime::units::MacAddress;

pub(super) async fn serve(endpoints: &Arc<Endpoints>, session: Session, ended: CancellationToken) {
    let peer = session.peer.clone();
    endpoints.hears(&peer, true);
    let reason = tokio::select! {
        reason = take_all(endpoints, session) => reason,
        () = ended.cancelled() => "the service ends, or the node has dialed again".to_owned(),
    };
    endpoints.hears(&peer, false);
    tracing::info!(peer, reason, "the node tells no more where its pods are");
}

async fn take_all(endpoints: &Arc<Endpoints>, session: Session) -> String {
    let peer = session.peer;
    let (sender, mut receiver) = control::start(session.control);
    loop {
        let taken = match receiver.recv().await {
            Ok(Control::Places(places)) => match take(endpoints, &peer, &places) {
                Ok(()) => {
                    let seq = places.seq;
                    if sender.send(PlacesAck { seq }).await.is_err() {
                        return "the connection was lost".to_owned();
                    }
                    Ok(())
                }
                Err(reason) => Err(reason),
            },
            Ok(Control::EndWanted(wanted)) => end_old_way(endpoints, &peer, wanted).await,
            Ok(message) => Err(format!("it sent a {}", message.name())),
            Err(error) => return chain(&error),
        };
        if let Err(reason) = taken {
            tracing::error!(peer, reason, "a node says what none would say");
            return reason;
        }
    }
}

fn take(endpoints: &Endpoints, peer: &str, places: &Places) -> Result<(), String> {
    let here: Option<Vec<Claim>> = places.here.iter().map(from_wire).collect();
    let here = here.ok_or("it claims an address that no pod has")?;
    let gone: Vec<_> = places.gone.iter().copied().map(MacAddress).collect();
    let taken = endpoints.take(peer, places.vni, places.whole, &here, &gone);
    taken.map_err(|error| chain(&error))
}

async fn end_old_way(
    endpoints: &Arc<Endpoints>,
    peer: &str,
    wanted: EndWanted,
) -> Result<(), String> {
    let wanted = wanted_from_wire(wanted).ok_or("it names an address that no pod has")?;
    let (endpoints, from) = (Arc::clone(endpoints), peer.to_owned());
    // It visits every CPU.
    let ended = tokio::task::spawn_blocking(move || endpoints.end_old_way(&from, &wanted)).await;
    match ended {
        Ok(Ok(())) => {}
        // It is asked for again, and the node that asks does not wait for ever.
        Ok(Err(error)) => {
            tracing::warn!(peer, error = chain(&error), "its old way is not ended");
        }
        Err(error) => tracing::warn!(peer, %error, "its old way is not ended"),
    }
    Ok(())
}
