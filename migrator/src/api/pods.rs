//! `/v1/pods`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::types::{ErrorCode, PodDetail, PodList, PodSummary};
use crate::daemon::node::Node;
use crate::pods::run as run_pod;

/// The longest that `wait` and `grace` may be.
const LONGEST: Duration = Duration::from_secs(3600);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RunQuery {
    #[serde(default = "yes")]
    wait: bool,
    #[serde(default = "default_timeout")]
    timeout_s: u64,
}

fn yes() -> bool {
    true
}

fn default_timeout() -> u64 {
    120
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StopQuery {
    /// The pod's own, if missing.
    grace_ms: Option<u64>,
}

/// Between the first signal and the last, where neither request nor pod names a time.
const GRACE: Duration = Duration::from_secs(10);

fn bounded(time: Duration, what: &str) -> Result<Duration, ApiError> {
    if time > LONGEST {
        return Err(ApiError::new(
            ErrorCode::Invalid,
            format!("{what} is longer than an hour"),
        ));
    }
    Ok(time)
}

pub(super) async fn list(State(node): State<Arc<Node>>) -> Json<PodList> {
    let pods = node.pods.list();
    Json(PodList {
        pods: pods.iter().map(|pod| pod.summary()).collect(),
    })
}

pub(super) async fn run(
    State(node): State<Arc<Node>>,
    Query(query): Query<RunQuery>,
    yaml: String,
) -> Result<Response, ApiError> {
    let deadline = bounded(Duration::from_secs(query.timeout_s), "timeout_s")?;
    let pod = run_pod::run(&node, &yaml, query.wait, deadline).await?;
    Ok((StatusCode::CREATED, Json(pod.summary())).into_response())
}

pub(super) async fn inspect(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<PodDetail>, ApiError> {
    Ok(Json(node.pods.get(&name)?.detail()))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StartQuery {
    #[serde(default = "default_timeout")]
    timeout_s: u64,
}

pub(super) async fn start(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Query(query): Query<StartQuery>,
) -> Result<Json<PodSummary>, ApiError> {
    let deadline = bounded(Duration::from_secs(query.timeout_s), "timeout_s")?;
    let pod = node.pods.get(&name)?;
    pod.start(deadline).await?;
    Ok(Json(pod.summary()))
}

pub(super) async fn stop(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Query(query): Query<StopQuery>,
) -> Result<Json<Value>, ApiError> {
    let pod = node.pods.get(&name)?;
    let own = pod.spec().settings.grace_s;
    let own = own.map_or(GRACE, |seconds| Duration::from_secs(seconds.into()));
    let grace = query.grace_ms.map_or(own, Duration::from_millis);
    pod.stop(bounded(grace, "grace_ms")?).await?;
    Ok(Json(json!({ "stopped": name })))
}
