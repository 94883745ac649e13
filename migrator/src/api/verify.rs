//! `/v1/verify`: are the images of this node what they should be?

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::error::ApiError;
use super::image_types::{VerifiedImage, VerifyRequest, VerifyResult};
use super::registry_errors::of_store;
use super::types::ErrorCode;
use crate::daemon::node::Node;
use crate::image::{Digest, ImageRecord, StoreError};
use crate::supply::Wanted;

pub(super) async fn verify(
    State(node): State<Arc<Node>>,
    Json(request): Json<VerifyRequest>,
) -> Result<Json<VerifyResult>, ApiError> {
    let store = Arc::clone(&node.images);
    let records = blocking(move || chosen(&store, &request.images)).await?;
    let records = records.map_err(|error| of_store(&error))?;
    let mut images = Vec::new();
    for record in records {
        images.push(one(&node, record, request.repair).await?);
    }
    Ok(Json(VerifyResult { images }))
}

/// The images of these names, or all; each once.
fn chosen(
    store: &crate::image::ImageStore,
    names: &[String],
) -> Result<Vec<ImageRecord>, StoreError> {
    let records: Vec<ImageRecord> = match names {
        [] => store.list(),
        names => {
            let found = names.iter().map(|name| store.resolve(name));
            found.collect::<Result<_, _>>()?
        }
    };
    let by_id: BTreeMap<Digest, ImageRecord> =
        records.into_iter().rev().map(|r| (r.id(), r)).collect();
    Ok(by_id.into_values().collect())
}

async fn one(
    node: &Arc<Node>,
    record: ImageRecord,
    repair: bool,
) -> Result<VerifiedImage, ApiError> {
    let record = Arc::new(record);
    let (store, verified) = (Arc::clone(&node.images), Arc::clone(&record));
    let verified = blocking(move || store.verify(&verified)).await?;
    let (mut repaired, mut problem) = (0, None);
    if repair {
        for index in verified.bad() {
            let wanted = Wanted {
                record: Arc::clone(&record),
                index,
            };
            match node.supply.fetch(&wanted).await {
                Ok(()) => repaired += 1,
                Err(lacking) => problem = Some(format!("chunk {index}: {lacking}")),
            }
        }
    }
    Ok(VerifiedImage {
        name: record.name.clone(),
        digest: record.manifest_digest.to_string(),
        chunks: record.chunks.len(),
        damaged: verified.damaged,
        missing: verified.missing,
        repaired,
        problem,
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| ApiError::caused(ErrorCode::Internal, &e))
}
