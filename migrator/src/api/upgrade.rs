//! `/v1/pods/NAME/upgrade`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use vm_runtime::qemu::QemuConfig;

use super::error::ApiError;
use crate::daemon::node::Node;
use crate::pods::upgrade::{UpgradeOrder, UpgradeReport};

/// Body of `POST /v1/pods/NAME/upgrade`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpgradeRequest {
    /// The QEMU that is to run the pod; the one of the node's configuration, as it is installed now, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<QemuConfig>,
}

pub(super) async fn upgrade(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Json(request): Json<UpgradeRequest>,
) -> Result<Json<UpgradeReport>, ApiError> {
    let order = UpgradeOrder { qemu: request.qemu };
    Ok(Json(node.pods.get(&name)?.upgrade(order).await?))
}
