//! `/v1/volumes`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use vm_runtime::units::Bytes;

use super::error::ApiError;
use super::types::{ErrorCode, VolumeInfo, VolumeList, VolumeRequest};
use crate::daemon::node::Node;
use crate::volumes::{Volume, VolumeError};

fn info(node: &Node, volume: Volume) -> VolumeInfo {
    VolumeInfo {
        used_by: node.pods.user_of(&volume.name),
        name: volume.name,
        size_bytes: volume.size,
        allocated_bytes: volume.allocated,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| ApiError::caused(ErrorCode::Internal, &e))?
        .map_err(of_volume)
}

fn of_volume(error: VolumeError) -> ApiError {
    let (code, hint) = match &error {
        VolumeError::Name(_) | VolumeError::Small(_) => (ErrorCode::Invalid, None),
        VolumeError::NotFound(_) => (
            ErrorCode::NotFound,
            Some("`migrator volume ls` lists those of this node"),
        ),
        VolumeError::Taken(_) => (ErrorCode::Conflict, None),
        VolumeError::Used { .. } => (ErrorCode::Conflict, Some("stop the pod first")),
        VolumeError::Disk { source, .. } if source.is_full() => (
            ErrorCode::Exhausted,
            Some("make room on the file system of state_dir"),
        ),
        VolumeError::Disk { .. } | VolumeError::Mkfs { .. } | VolumeError::Folder { .. } => {
            (ErrorCode::Internal, None)
        }
    };
    let answer = ApiError::caused(code, &error);
    match hint {
        Some(hint) => answer.hint(hint),
        None => answer,
    }
}

pub(super) async fn list(State(node): State<Arc<Node>>) -> Result<Json<VolumeList>, ApiError> {
    let volumes = node.volumes.clone();
    let found = blocking(move || volumes.list()).await?;
    let volumes = found.into_iter().map(|v| info(&node, v)).collect();
    Ok(Json(VolumeList { volumes }))
}

pub(super) async fn create(
    State(node): State<Arc<Node>>,
    Json(request): Json<VolumeRequest>,
) -> Result<Response, ApiError> {
    let volumes = node.volumes.clone();
    let made = blocking(move || volumes.create(&request.name, Bytes(request.size_bytes))).await?;
    tracing::info!(volume = made.name, size = made.size, "made");
    Ok((StatusCode::CREATED, Json(info(&node, made))).into_response())
}

pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (pods, volumes) = (node.pods.clone(), node.volumes.clone());
    let volume = name.clone();
    blocking(
        move || match pods.unused(&volume, || volumes.remove(&volume)) {
            Ok(removed) => removed,
            Err(pod) => Err(VolumeError::Used { volume, pod }),
        },
    )
    .await?;
    tracing::info!(volume = name, "removed");
    Ok(Json(json!({ "removed": name })))
}
