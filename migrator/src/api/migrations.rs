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

use super::error::ApiError;
use super::types::{ErrorCode, MigrateRequest, MigrationList, MigrationStarted};
use crate::daemon::migrations::CancelError;
use crate::daemon::node::Node;
use crate::migration::driver;
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
    let options = driver::Options {
        verify: request.options.verify,
        max_downtime_ms: request
            .options
            .max_downtime_ms
            .unwrap_or(defaults.max_downtime_ms),
        mode: request.options.mode.unwrap_or_default(),
        on_stall: request.options.on_stall.unwrap_or_default(),
        connections,
        bandwidth: request.options.bandwidth,
        compress: request.options.compress.unwrap_or(defaults.compress),
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
