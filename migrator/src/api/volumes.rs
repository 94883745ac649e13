//! `/v1/volumes`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use vm_runtime::units::Bytes;

use super::error::{ApiError, chain};
use super::types::{ErrorCode, ReleaseRequest, VolumeInfo, VolumeList, VolumeRequest};
use crate::config::LOCAL_CLASS;
use crate::daemon::node::Node;
use crate::storage::{SharedVolume, StorageError};
use crate::volumes::{Volume, VolumeError};

fn info(node: &Node, volume: Volume) -> VolumeInfo {
    VolumeInfo {
        used_by: node.pods.user_of(&volume.name),
        name: volume.name,
        size_bytes: volume.size,
        allocated_bytes: volume.allocated,
        class: LOCAL_CLASS.to_owned(),
        node: None,
        ephemeral: false,
    }
}

fn shared_info(volume: SharedVolume) -> VolumeInfo {
    let (used_by, node) = match volume.record.holder {
        Some(holder) => (Some(holder.pod), Some(holder.node)),
        None => (None, None),
    };
    VolumeInfo {
        used_by,
        name: volume.name,
        size_bytes: volume.size,
        allocated_bytes: volume.allocated,
        class: volume.class,
        node,
        ephemeral: volume.record.ephemeral,
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
        VolumeError::NotFound(_) | VolumeError::Storage(StorageError::NotFound { .. }) => (
            ErrorCode::NotFound,
            Some("`migrator volume ls` lists those that this node sees"),
        ),
        VolumeError::Storage(StorageError::NoClass { .. }) => (ErrorCode::NotFound, None),
        VolumeError::Storage(StorageError::Taken(_) | StorageError::Marked { .. }) => {
            (ErrorCode::Conflict, None)
        }
        VolumeError::Storage(StorageError::Refused { .. } | StorageError::Served { .. }) => (
            ErrorCode::Conflict,
            Some("stop the pod first, on the node where it is"),
        ),
        VolumeError::Storage(StorageError::NeedsForce { .. }) => (
            ErrorCode::Conflict,
            Some(
                "stop the pod there; if that node is dead for good, or its power is off, --force takes the volume from it: were the pod \
                 still running, two would write to one file system and destroy it",
            ),
        ),
        VolumeError::Storage(StorageError::Tool { .. }) => (ErrorCode::Unavailable, None),
        VolumeError::Storage(_) => (ErrorCode::Internal, None),
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
    let (volumes, storage) = (node.volumes.clone(), Arc::clone(&node.storage));
    let (found, (shared, failed)) = blocking(move || Ok((volumes.list()?, storage.list()))).await?;
    let local = found.into_iter().map(|v| info(&node, v));
    let mut volumes: Vec<VolumeInfo> = local.chain(shared.into_iter().map(shared_info)).collect();
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    let problems = failed.iter().map(|error| chain(error)).collect();
    Ok(Json(VolumeList { volumes, problems }))
}

pub(super) async fn create(
    State(node): State<Arc<Node>>,
    Json(request): Json<VolumeRequest>,
) -> Result<Response, ApiError> {
    let (volumes, storage) = (node.volumes.clone(), Arc::clone(&node.storage));
    let VolumeRequest {
        name,
        size_bytes,
        class,
    } = request;
    let class = class.filter(|class| class != LOCAL_CLASS);
    let shown = Arc::clone(&node);
    let made = blocking(move || {
        volumes.check(&name, Bytes(size_bytes))?;
        // A pod claims it by its name alone. What is made here does not depend on storage that may be down.
        match storage.find(&name) {
            Ok(Some(_)) => return Err(VolumeError::Taken(name)),
            Err(error) if class.is_some() => return Err(error.into()),
            Ok(None) | Err(_) => {}
        }
        if volumes.find(&name).is_ok() {
            return Err(VolumeError::Taken(name));
        }
        Ok(match class {
            None => info(&shown, volumes.create(&name, Bytes(size_bytes))?),
            Some(class) => {
                let class = storage.class(&class)?;
                shared_info(class.create(&name, Bytes(size_bytes), false)?)
            }
        })
    })
    .await?;
    tracing::info!(
        volume = made.name,
        class = made.class,
        size = made.size_bytes,
        "made"
    );
    Ok((StatusCode::CREATED, Json(made)).into_response())
}

pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (pods, volumes) = (node.pods.clone(), node.volumes.clone());
    let storage = Arc::clone(&node.storage);
    let volume = name.clone();
    blocking(move || {
        let remove = || match volumes.remove(&volume) {
            Err(VolumeError::NotFound(name)) => match storage.find(&volume)? {
                Some(found) => Ok(storage.class(&found.class)?.remove(&volume)?),
                None => Err(VolumeError::NotFound(name)),
            },
            removed => removed,
        };
        match pods.unused(&volume, remove) {
            Ok(removed) => removed,
            Err(pod) => Err(VolumeError::Used { volume, pod }),
        }
    })
    .await?;
    tracing::info!(volume = name, "removed");
    Ok(Json(json!({ "removed": name })))
}

pub(super) async fn release(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Json(request): Json<ReleaseRequest>,
) -> Result<Json<Value>, ApiError> {
    let (storage, pods) = (Arc::clone(&node.storage), node.pods.clone());
    let (volume, here) = (name.clone(), node.name().to_owned());
    let freed = blocking(move || {
        let found = storage.find(&volume)?;
        let found = found.ok_or_else(|| VolumeError::NotFound(volume.clone()))?;
        if let Some(holder) = &found.record.holder
            && holder.node == here
            && pods.get(&holder.pod).is_ok()
        {
            let pod = holder.pod.clone();
            return Err(VolumeError::Used { volume, pod });
        }
        Ok(storage
            .class(&found.class)?
            .release(&volume, &here, request.force)?)
    })
    .await?;
    if let Some(holder) = &freed {
        tracing::warn!(
            volume = name,
            node = holder.node,
            pod = holder.pod,
            force = request.force,
            "released"
        );
    }
    Ok(Json(json!({ "released": name, "from": freed })))
}

pub(super) async fn init(
    State(node): State<Arc<Node>>,
    Path(class): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let (storage, name) = (Arc::clone(&node.storage), class.clone());
    let id = blocking(move || Ok(storage.class(&name)?.init()?)).await?;
    tracing::info!(class, id, "prepared");
    Ok(Json(json!({ "class": class, "id": id })))
}
