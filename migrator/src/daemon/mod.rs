//! `migrator node`: opens what a node needs, finds its pods again, serves the API and the other nodes,
//! and ends in order, leaving VMs running and packets flowing.

pub mod migrations;
pub mod node;
mod places;

mod start;

use std::error::Error;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::api;
use crate::config::{Config, NodeName};
use crate::migration::driver;
use crate::pods::recover;
use crate::supply;
use crate::wire::preamble::Shape;
use crate::wire::session::{Limits, Listener};
use node::Node;

/// How long tasks get to end after a signal. Migrations before their grant are aborted in this time.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(20);

/// Why the service does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state folder.
    #[error("cannot use the state folder {}", path.display())]
    StateDir {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another service has it.
    #[error("another service uses the state folder {}: stop that one, or give this one a state_dir of its own", .0.display())]
    Locked(PathBuf),
    /// Kernel or initramfs.
    #[error("cannot read {}, which guests boot from", path.display())]
    GuestFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A part of the node.
    #[error("cannot open {what}")]
    Open {
        /// Which.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

impl DaemonError {
    fn open(what: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Open {
            what,
            source: source.into(),
        }
    }
}

/// Sends log lines to stderr; `RUST_LOG` chooses which, `info` is the default.
pub fn init_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call, as in tests, keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .try_init();
}

/// Runs the service until SIGTERM or SIGINT.
///
/// # Errors
/// See [`DaemonError`]; pods that an earlier service left are untouched then.
pub async fn run(config: Config) -> Result<(), DaemonError> {
    let _lock = start::lock(&config.state_dir, start::FORMER_ENDS_WITHIN)?;
    start::raise_descriptor_limit();
    let signals = |kind| signal(kind).map_err(|e| DaemonError::open("the signal handlers", e));
    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    let (node, journal) = start::open(config).await?;
    let listener = listen(&node).await?;
    // Before VMMs are found again, which may read what is not here.
    node.supply.start();
    // A VMM that waits for a page cannot be found again before the page comes.
    driver::page_early(&node, &journal).await;
    node.tasks.spawn(accept(Arc::clone(&node), listener));
    // Before anybody can ask for anything.
    let open = recover::recover(&node, journal)
        .await
        .map_err(|e| DaemonError::open("the pods' folders", e))?;
    let api = api::server::bind(&node.config.api_socket())
        .map_err(|e| DaemonError::open("the API's socket", e))?;
    start::release_images(&node, &open).await;
    for migration in open {
        node.tasks
            .spawn(driver::recover(Arc::clone(&node), migration));
    }
    node.found.cancel();
    places::start(&node);
    let serving = node.tasks.spawn(api::server::serve(Arc::clone(&node), api));
    tracing::info!(
        node = node.name(),
        api = %node.config.api_socket().display(),
        listen = %node.config.listen,
        "serving"
    );
    let signal = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = serving => "the API's end",
    };
    tracing::info!(signal, "ending; VMs go on");
    node.shutdown.cancel();
    node.tasks.close();
    tokio::select! {
        ended = tokio::time::timeout(SHUTDOWN_DEADLINE, node.tasks.wait()) => if ended.is_err() {
            tracing::warn!(left = node.tasks.len(), "some tasks did not end in time");
        },
        _ = terminate.recv() => tracing::warn!("ending at once"),
        _ = interrupt.recv() => tracing::warn!("ending at once"),
    }
    // A socket that nobody listens on would look like a broken service.
    let _ = std::fs::remove_file(node.config.api_socket());
    Ok(())
}

async fn listen(node: &Node) -> Result<Listener, DaemonError> {
    let peers = node
        .config
        .peers
        .keys()
        .map(NodeName::as_str)
        .map(str::to_owned);
    Listener::bind(
        node.config.listen,
        node.tls.clone(),
        peers.collect(),
        Limits::default(),
    )
    .await
    .map_err(|e| DaemonError::open("the port for other nodes", e))
}

/// Hands what other nodes dial to the driver, one task a session.
async fn accept(node: Arc<Node>, mut listener: Listener) {
    loop {
        let session = tokio::select! {
            session = listener.accept() => session,
            () = node.shutdown.cancelled() => return,
        };
        match (session.shape, &node.directory) {
            (Shape::Chunks, _) => {
                let chunks = Arc::clone(node.images.chunks());
                let serve = supply::serve(chunks, session, node.shutdown.clone());
                node.tasks.spawn(serve);
            }
            (Shape::Places, Some(directory)) => {
                node.tasks.spawn(directory.clone().serve(session));
            }
            (Shape::Places, None) => tracing::warn!(
                peer = session.peer,
                "it tells where its pods are, and pods are not routed here: set the same `topology` on every node"
            ),
            (Shape::Migration { .. } | Shape::Resume { .. } | Shape::Query, _) => {
                node.tasks
                    .spawn(driver::incoming(Arc::clone(&node), session));
            }
        }
    }
}
