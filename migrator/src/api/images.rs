//! `/v1/images`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::types::{ErrorCode, ImageList, ImageSummary, ImportRequest};
use crate::daemon::node::Node;
use crate::image::{Digest, ImageRecord, StoreError};

/// Each disk in use on this node, with the pod that uses it.
fn in_use(node: &Node) -> Vec<(Digest, String)> {
    let mut used = Vec::new();
    for pod in node.pods.list() {
        for disk in &pod.vm_spec().disks {
            if let Ok(digest) = disk.image_digest.parse::<Digest>() {
                used.push((digest, pod.name().to_owned()));
            }
        }
    }
    used
}

fn summary(record: ImageRecord, used: &[(Digest, String)]) -> ImageSummary {
    ImageSummary {
        used_by: used
            .iter()
            .filter(|(digest, _)| *digest == record.erofs_digest)
            .map(|(_, pod)| pod.clone())
            .collect(),
        digest: record.manifest_digest.to_string(),
        size_bytes: record.erofs_size,
        chunks: record.chunks.len(),
        name: record.name,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| ApiError::caused(ErrorCode::Internal, &e))
}

pub(super) async fn list(State(node): State<Arc<Node>>) -> Result<Json<ImageList>, ApiError> {
    let store = Arc::clone(&node.images);
    let records = blocking(move || store.list()).await?;
    let used = in_use(&node);
    let mut images: Vec<ImageSummary> = records.into_iter().map(|r| summary(r, &used)).collect();
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Json(ImageList { images }))
}

pub(super) async fn import(
    State(node): State<Arc<Node>>,
    Json(request): Json<ImportRequest>,
) -> Result<Response, ApiError> {
    if !request.path.is_absolute() {
        return Err(ApiError::new(
            ErrorCode::Invalid,
            format!("`{}` is not an absolute path", request.path.display()),
        ));
    }
    let store = Arc::clone(&node.images);
    let imported = blocking(move || store.import(&request.path, request.name.as_deref())).await?;
    let record = imported.map_err(|e| {
        ApiError::caused(ErrorCode::Invalid, &e)
            .hint("an OCI image layout or archive is needed, as `skopeo copy` and `umoci` make it")
    })?;
    tracing::info!(image = record.name, digest = %record.manifest_digest, "imported");
    let summary = summary(record, &in_use(&node));
    Ok((StatusCode::CREATED, Json(summary)).into_response())
}

pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let used: Vec<Digest> = in_use(&node)
        .into_iter()
        .map(|(digest, _)| digest)
        .collect();
    let store = Arc::clone(&node.images);
    let image = name.clone();
    match blocking(move || store.remove(&image, &used)).await? {
        Ok(()) => Ok(Json(json!({ "removed": name }))),
        Err(error @ StoreError::NotFound(_)) => Err(ApiError::caused(ErrorCode::NotFound, &error)),
        Err(error @ (StoreError::InUse(_) | StoreError::Ambiguous(_))) => {
            Err(ApiError::caused(ErrorCode::Conflict, &error))
        }
        Err(error @ StoreError::Name(_)) => Err(ApiError::caused(ErrorCode::Invalid, &error)),
        Err(
            error @ (StoreError::Io { .. }
            | StoreError::Locked { .. }
            | StoreError::NoChunk { .. }
            | StoreError::Damaged { .. }),
        ) => Err(ApiError::caused(ErrorCode::Internal, &error)),
    }
}
