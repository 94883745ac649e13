//! `/v1/pods/NAME/migrate` and `/v1/migrations`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use vm_runtime::pod::PodSpec;

use super::error::ApiError;
use super::types::{ErrorCode, MigrateRequest, MigrationList, MigrationStarted};
use crate::daemon::migrations::CancelError;
use crate::daemon::node::Node;
use crate::migration::driver;
use crate::migration::mode::Mode;
use crate::migration::status::MigrationStatus;
use crate::wire::id::MigrationId;
use crate::wire::preamble::MAX_DATA_CONNECTIONS;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WatchQuery {
    #[serde(default)]
    watch: u8,
}

pub(super) async fn start(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Json(request): Json<MigrateRequest>,
) -> Result<Response, ApiError> {
    let pod = node.pods.get(&name)?;
    let known = node
        .config
        .peers
        .iter()
        .find(|(peer, _)| peer.as_str() == request.to);
    let Some((peer, addr)) = known else {
        if request.to == node.name() {
            return Err(ApiError::new(
                ErrorCode::Conflict,
                format!("pod `{name}` is on node `{}` already", request.to),
            ));
        }
        let names: Vec<&str> = node.config.peers.keys().map(|p| p.as_str()).collect();
        return Err(ApiError::not_found("peer", &request.to).hint(format!(
            "this node's configuration names: {}",
            names.join(", ")
        )));
    };
    let defaults = &node.config.migration;
    let connections = request.options.connections.unwrap_or(defaults.connections);
    if !(1..=MAX_DATA_CONNECTIONS).contains(&connections) {
        return Err(ApiError::new(
            ErrorCode::Invalid,
            format!("connections must be between 1 and {MAX_DATA_CONNECTIONS}"),
        ));
    }
    let mode = mode_for(pod.spec(), request.options.mode.unwrap_or_default())?;
    let options = driver::Options {
        verify: request.options.verify,
        max_downtime_ms: request
            .options
            .max_downtime_ms
            .unwrap_or(defaults.max_downtime_ms),
        mode,
        on_stall: request.options.on_stall.unwrap_or_default(),
        connections,
        bandwidth: request.options.bandwidth,
        compress: request.options.compress.unwrap_or(defaults.compress),
        on_overflow: request.options.on_overflow.unwrap_or(defaults.on_overflow),
        images: request.options.images.unwrap_or_default(),
    };
    let id = MigrationId::random();
    // The pod is marked before anybody hears of the migration, so that two cannot take the same one.
    let resources = pod.begin_migration(id.to_string()).await?;
    let ticket = node
        .migrations
        .begin(id, pod.name(), node.name(), peer.as_str());
    let job = driver::Outgoing {
        ticket,
        pod,
        resources,
        to: peer.clone(),
        addr: *addr,
        options,
    };
    node.tasks.spawn(driver::outgoing(Arc::clone(&node), job));
    let started = MigrationStarted { id: id.to_string() };
    Ok((StatusCode::ACCEPTED, Json(started)).into_response())
}

/// How the pod's memory crosses, of what was asked for. A missing page is filled in 4 KiB at a time, which huge pages are not made of.
fn mode_for(pod: &PodSpec, mode: Mode) -> Result<Mode, ApiError> {
    match (pod.hugepages, mode) {
        (false, mode) => Ok(mode),
        (true, Mode::Precopy | Mode::Auto) => Ok(Mode::Precopy),
        (true, Mode::Postcopy | Mode::Hybrid) => {
            let text = format!(
                "pod `{}` has huge pages, which all cross before the guest moves",
                pod.name
            );
            Err(ApiError::new(ErrorCode::Invalid, text).hint("use --mode precopy"))
        }
    }
}

pub(super) async fn list(State(node): State<Arc<Node>>) -> Json<MigrationList> {
    Json(MigrationList {
        migrations: node.migrations.list(),
    })
}

fn parse(id: &str) -> Result<MigrationId, ApiError> {
    id.parse()
        .map_err(|_| ApiError::not_found("migration", id).hint("`migrator status` lists them"))
}

pub(super) async fn status(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
    Query(query): Query<WatchQuery>,
) -> Result<Response, ApiError> {
    let Some(mut status) = node.migrations.watch(parse(&id)?) else {
        return Err(ApiError::not_found("migration", &id).hint("`migrator status` lists them"));
    };
    if query.watch == 0 {
        let status = status.borrow().clone();
        return Ok(Json(status).into_response());
    }
    status.mark_changed();
    let shutdown = node.shutdown.clone();
    let lines = stream::unfold(Some((status, shutdown)), |state| async {
        let (mut status, shutdown) = state?;
        tokio::select! {
            changed = status.changed() => changed.ok()?,
            () = shutdown.cancelled() => return None,
        }
        let value = status.borrow_and_update().clone();
        let next = value.report.is_none().then_some((status, shutdown));
        Some((line(&value), next))
    });
    Ok((
        [(CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(lines),
    )
        .into_response())
}

fn line(status: &MigrationStatus) -> Result<Bytes, serde_json::Error> {
    let mut line = serde_json::to_vec(status)?;
    line.push(b'\n');
    Ok(line.into())
}

pub(super) async fn cancel(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match node.migrations.cancel(parse(&id)?) {
        Ok(()) => Ok(Json(json!({ "cancelling": id }))),
        Err(CancelError::Unknown) => Err(ApiError::not_found("migration", &id)),
        Err(
            error @ (CancelError::Over | CancelError::HandedOver | CancelError::Postcopy { .. }),
        ) => Err(ApiError::caused(ErrorCode::Busy, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::golden::offer;

    #[test]
    fn huge_pages_cross_before_the_guest_moves_or_not_at_all() {
        let mut pod = offer().pod;
        let all = [Mode::Precopy, Mode::Postcopy, Mode::Hybrid, Mode::Auto];
        for mode in all {
            assert_eq!(mode_for(&pod, mode).unwrap(), mode);
        }
        pod.hugepages = true;
        let chosen = all.map(|mode| mode_for(&pod, mode).ok());
        let before = Some(Mode::Precopy);
        assert_eq!(chosen, [before, None, None, before]);
    }
}
