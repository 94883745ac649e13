//! `/v1/templates`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::template_types::{TemplateInfo, TemplateList};
use super::types::ErrorCode;
use crate::daemon::node::Node;
use crate::pods::run::shape_of;
use crate::templates::{Key, Template, TemplateError, build as make};

impl From<Template> for TemplateInfo {
    fn from(template: Template) -> Self {
        let shape = template.file.shape;
        Self {
            key: template.key.to_string(),
            memory_bytes: shape.memory.0,
            hugepages: shape.hugepages,
            vcpus: shape.vcpus,
            disks: shape.disks.len() + shape.writable.len(),
            qemu: template.file.qemu,
            pages: template.file.pages,
            allocated_bytes: template.allocated,
            made_unix_ms: template.file.made_unix_ms,
            used_unix_ms: template.used_unix_ms,
            starts: template.starts,
        }
    }
}

fn refused(error: TemplateError) -> ApiError {
    let code = match error {
        TemplateError::Pod(error) => return (*error).into(),
        TemplateError::NotFound(_) => ErrorCode::NotFound,
        TemplateError::Off => ErrorCode::Invalid,
        TemplateError::Memory { .. } => ErrorCode::Exhausted,
        TemplateError::ShuttingDown => ErrorCode::Unavailable,
        TemplateError::Step { .. } | TemplateError::File { .. } | TemplateError::Damaged(_) => {
            ErrorCode::Internal
        }
    };
    let answer = ApiError::caused(code, &error);
    match error {
        TemplateError::NotFound(_) => {
            answer.hint("`migrator template ls` lists those of this node")
        }
        _ => answer,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| ApiError::caused(ErrorCode::Internal, &e))?
        .map_err(refused)
}

pub(super) async fn list(State(node): State<Arc<Node>>) -> Result<Json<TemplateList>, ApiError> {
    let templates = Arc::clone(&node.templates);
    let found = blocking(move || templates.list()).await?;
    Ok(Json(TemplateList {
        templates: found.into_iter().map(TemplateInfo::from).collect(),
    }))
}

pub(super) async fn build(
    State(node): State<Arc<Node>>,
    yaml: String,
) -> Result<Response, ApiError> {
    let maker = Arc::clone(&node);
    // A client that goes away must not leave a VM behind.
    let made = node.tasks.spawn(async move {
        let shape = shape_of(&maker, &yaml)
            .await
            .map_err(|e| TemplateError::Pod(e.into()))?;
        make(&maker, &shape).await
    });
    let made = made
        .await
        .map_err(|e| ApiError::caused(ErrorCode::Internal, &e))?
        .map_err(refused)?;
    Ok((StatusCode::CREATED, Json(TemplateInfo::from(made))).into_response())
}

pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let templates = Arc::clone(&node.templates);
    let key = name.clone();
    blocking(move || match Key::parse(&key) {
        Some(key) => templates.remove(&key),
        None => Err(TemplateError::NotFound(key)),
    })
    .await?;
    tracing::info!(template = name, "removed");
    Ok(Json(json!({ "removed": name })))
}
