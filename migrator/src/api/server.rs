//! The socket, the routes, and what is about the node itself.

use std::future::IntoFuture;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{Method, Uri};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use tokio::net::UnixListener;

use super::error::ApiError;
use super::types::{ErrorCode, Health, NodeInfo, QemuInfo};
use super::{
    exec, images, logs, migrations, net, pods, registry, templates, upgrade, verify, volumes,
};
use crate::daemon::node::Node;
use crate::doctor;
use crate::network::Ground;

/// Longest body that is read: a pod's YAML.
const MAX_BODY: usize = 1 << 20;

/// What open streams get to end when the service ends.
const GOODBYE: Duration = Duration::from_secs(3);

/// Makes the socket. Only root may connect: whoever may use the API may run anything on the node.
///
/// # Errors
/// The path cannot be used. A socket that nobody listens on any more is replaced.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)?;
    }
    // The state folder's lock says that no other service of this node lives; but the path may be
    // another node's.
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("another service answers at {}", path.display()),
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until the node shuts down.
pub async fn serve(node: Arc<Node>, listener: UnixListener) {
    let shutdown = node.shutdown.clone();
    let graceful = shutdown.clone();
    let server = axum::serve(listener, router(node))
        .with_graceful_shutdown(async move { graceful.cancelled().await })
        .into_future();
    tokio::pin!(server);
    let result = tokio::select! {
        result = &mut server => result,
        () = shutdown.cancelled() => {
            match tokio::time::timeout(GOODBYE, server).await {
                Ok(result) => result,
                // Followers of logs and commands: their clients see the end of the stream.
                Err(_) => Ok(()),
            }
        }
    };
    if let Err(error) = result {
        tracing::error!(%error, "the API ended");
    }
}

fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/health", get(health))
        .route("/v1/node", get(about))
        .route("/v1/doctor", get(examine))
        .route("/v1/pods", get(pods::list).post(pods::run))
        .route("/v1/pods/{name}", get(pods::inspect).delete(pods::stop))
        .route("/v1/pods/{name}/start", post(pods::start))
        .route("/v1/pods/{name}/logs", get(logs::logs))
        .route("/v1/pods/{name}/exec", post(exec::exec))
        .route("/v1/pods/{name}/migrate", post(migrations::start))
        .route("/v1/pods/{name}/upgrade", post(upgrade::upgrade))
        .route("/v1/migrations", get(migrations::list))
        .route(
            "/v1/migrations/{id}",
            get(migrations::status).delete(migrations::cancel),
        )
        .route("/v1/net", get(net::node))
        .route("/v1/net/{name}", get(net::pod))
        .route("/v1/net/{name}/trace", get(net::trace))
        .route("/v1/images", get(images::list).post(images::import))
        .route("/v1/images/{*name}", delete(images::remove))
        .route("/v1/pulls", post(registry::pull))
        .route("/v1/pushes", post(registry::push))
        .route("/v1/volumes", get(volumes::list).post(volumes::create))
        .route("/v1/volumes/{name}", delete(volumes::remove))
        .route("/v1/templates", get(templates::list).post(templates::build))
        .route("/v1/templates/{key}", delete(templates::remove))
        .route("/v1/volumes/{name}/release", post(volumes::release))
        .route("/v1/storage/{class}/init", post(volumes::init))
        .route("/v1/saves", post(images::save))
        .route("/v1/leases", post(images::lease))
        .route("/v1/gc", post(images::gc))
        .route("/v1/verify", post(verify::verify))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(node)
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::new(
        ErrorCode::NotFound,
        format!("there is no route {}", uri.path()),
    )
    .hint("docs/api.md lists the routes; all start with /v1/")
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(
        ErrorCode::Invalid,
        format!("{} does not take {method}", uri.path()),
    )
}

async fn health(State(node): State<Arc<Node>>) -> Json<Health> {
    Json(Health {
        status: "ok".to_owned(),
        node: node.name().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

async fn about(State(node): State<Arc<Node>>) -> Json<NodeInfo> {
    let config = &node.config;
    Json(NodeInfo {
        name: node.name().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        state_dir: config.state_dir.clone(),
        bridge: config.bridge.as_ref().map(ToString::to_string),
        routed: match config.ground() {
            Ground::Bridge(_) => None,
            Ground::Routed(pods) => Some(pods),
        },
        uplink: config.uplink.to_string(),
        uplink_path: node.network.uplink().clone(),
        advertise: config.advertised(),
        peers: config
            .peers
            .iter()
            .map(|(name, addr)| (name.to_string(), *addr))
            .collect(),
        qemu: QemuInfo {
            path: node.qemu.path.clone(),
            version: node.qemu.version_text(),
            machine: node.machine.clone(),
        },
        accel: node.accel,
        accel_reason: node.accel_reason.clone(),
        tunnel: node.network.tunnel_info().await,
        pods: node.pods.list().len(),
    })
}

async fn examine(State(node): State<Arc<Node>>) -> Json<doctor::Report> {
    let mut report = doctor::examine(&doctor::Subject::of_config(&node.config)).await;
    let uplink = node.config.uplink.as_str();
    report.checks.push(doctor::uplink(
        uplink,
        node.config.xdp,
        node.network.uplink(),
    ));
    let tunnel = node.network.tunnel_info().await;
    report.checks.push(doctor::late_frames(&tunnel));
    Json(report)
}
