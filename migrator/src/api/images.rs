//! `/v1/images`, `/v1/saves`, `/v1/leases` and `/v1/gc`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::{ApiError, chain};
use super::image_types::{
    GcRequest, GcResult, ImageList, ImageSummary, ImportRequest, Lease, LeaseRequest, SaveRequest,
    Saved,
};
use super::registry_errors::{of_save, of_store};
use super::types::ErrorCode;
use crate::daemon::node::Node;
use crate::image::{Digest, ImageRecord};

/// Each disk in use on this node, with the pod that uses it.
pub(crate) fn in_use(node: &Node) -> Vec<(Digest, String)> {
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

pub(super) fn summary(node: &Node, record: ImageRecord, used: &[(Digest, String)]) -> ImageSummary {
    ImageSummary {
        leased_until_unix_ms: node.images.leased_until(&record, SystemTime::now()),
        used_by: used
            .iter()
            .filter(|(digest, _)| *digest == record.erofs_digest)
            .map(|(_, pod)| pod.clone())
            .collect(),
        digest: record.manifest_digest.to_string(),
        here_bytes: node.images.chunks().bytes_here(&record),
        problem: node.supply.problem(&record.erofs_digest),
        size_bytes: record.erofs_size,
        chunks: record.chunks.len(),
        name: record.name,
    }
}

pub(super) fn absolute(path: &std::path::Path) -> Result<(), ApiError> {
    if path.is_absolute() {
        return Ok(());
    }
    let message = format!("`{}` is not an absolute path", path.display());
    Err(ApiError::new(ErrorCode::Invalid, message))
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
    let mut images: Vec<ImageSummary> = records
        .into_iter()
        .map(|record| summary(&node, record, &used))
        .collect();
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Json(ImageList { images }))
}

pub(super) async fn import(
    State(node): State<Arc<Node>>,
    Json(request): Json<ImportRequest>,
) -> Result<Response, ApiError> {
    absolute(&request.path)?;
    let store = Arc::clone(&node.images);
    let (path, name) = (request.path.clone(), request.name);
    let imported = blocking(move || store.import(&path, name.as_deref())).await?;
    let record = imported.map_err(|e| {
        ApiError::caused(ErrorCode::Invalid, &e)
            .hint("an OCI image layout or archive is needed, as `skopeo copy` and `umoci` make it")
    })?;
    tracing::info!(image = record.name, digest = %record.manifest_digest, "imported");
    keep_layers(&node, request.path, &record, request.keep_layers).await?;
    let summary = summary(&node, record, &in_use(&node));
    Ok((StatusCode::CREATED, Json(summary)).into_response())
}

/// Keeps the layers of an image that was imported: a failure if it was asked for, else a word in the log.
async fn keep_layers(
    node: &Node,
    path: PathBuf,
    record: &ImageRecord,
    asked: bool,
) -> Result<(), ApiError> {
    if !asked && !node.config.registries.keep_layers {
        return Ok(());
    }
    let (store, digest) = (Arc::clone(&node.images), record.manifest_digest);
    match blocking(move || store.keep(&path, digest)).await? {
        Ok(()) => Ok(()),
        Err(error) if asked => {
            let message = format!(
                "image `{}` is imported, but its layers cannot be kept: {}",
                record.name,
                chain(&error)
            );
            Err(ApiError::new(ErrorCode::Invalid, message))
        }
        Err(error) => {
            tracing::warn!(
                image = record.name,
                error = chain(&error),
                "its layers are not kept"
            );
            Ok(())
        }
    }
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
    let removed = blocking(move || store.remove(&image, &used)).await?;
    removed.map_err(|error| of_store(&error))?;
    Ok(Json(json!({ "removed": name })))
}

pub(super) async fn save(
    State(node): State<Arc<Node>>,
    Json(request): Json<SaveRequest>,
) -> Result<Response, ApiError> {
    absolute(&request.path)?;
    let store = Arc::clone(&node.images);
    let SaveRequest { image, path } = request;
    let to = path.clone();
    let saved = blocking(move || store.save(&image, &to)).await?;
    let size_bytes = saved.map_err(|error| of_save(&error))?;
    Ok((StatusCode::CREATED, Json(Saved { path, size_bytes })).into_response())
}

pub(super) async fn lease(
    State(node): State<Arc<Node>>,
    Json(request): Json<LeaseRequest>,
) -> Result<Json<Lease>, ApiError> {
    let store = Arc::clone(&node.images);
    let (image, time) = (request.image.clone(), Duration::from_secs(request.seconds));
    let lease = move || store.lease(&image, SystemTime::now(), time);
    let leased = blocking(lease).await?;
    Ok(Json(Lease {
        image: request.image,
        until_unix_ms: leased.map_err(|error| of_store(&error))?,
    }))
}

pub(super) async fn gc(
    State(node): State<Arc<Node>>,
    Json(GcRequest { dry_run }): Json<GcRequest>,
) -> Result<Json<GcResult>, ApiError> {
    if !node.found.is_cancelled() {
        return Err(ApiError::new(
            ErrorCode::Busy,
            "the service is still finding the pods of the one before it",
        )
        .hint("try again in a moment"));
    }
    let own = Arc::clone(&node);
    let collect = move || {
        let used = || in_use(&own).into_iter().map(|(digest, _)| digest).collect();
        own.images.collect(used, SystemTime::now(), dry_run)
    };
    let garbage = blocking(collect).await?.map_err(|error| of_store(&error))?;
    let bytes = garbage.bytes();
    if !dry_run {
        tracing::info!(images = garbage.images.len(), bytes, "cleared away");
    }
    let images = garbage.images.into_iter();
    Ok(Json(GcResult {
        images: images.map(|record| summary(&node, record, &[])).collect(),
        blobs: garbage.blobs.len(),
        bytes,
        dry_run,
    }))
}
