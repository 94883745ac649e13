//! A socket, and whoever connects to it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use super::codec::Facts;
use super::negotiate::negotiate;
use super::session::Session;
use crate::block::Export;

/// Most clients of a disk at once: its VMM, that one's successor, and somebody who looks.
const MAX_CLIENTS: usize = 8;
/// What a client may take for each message of its handshake.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// `sizeof(sun_path)` without the final zero, unix(7).
const MAX_SOCKET_PATH: usize = 107;

/// Why a disk is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket's path is too long for the kernel.
    #[error("the socket {} has a path longer than {MAX_SOCKET_PATH} bytes: choose a shorter `state_dir`", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made, or no thread for it.
    #[error("cannot serve a disk at {}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Serves one disk or image on one socket until it is dropped. Connections are cut then; what was not answered is the client's to repeat.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: Arc<UnixListener>,
    clients: Arc<Clients>,
}

#[derive(Debug, Default)]
struct Clients(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    over: bool,
    sessions: Vec<Weak<Session>>,
    /// Also those that are at their handshake.
    count: usize,
}

impl Server {
    /// Begins to serve; the socket can be connected to when this returns. A socket that is there already is replaced.
    ///
    /// # Errors
    /// The path is too long, or the socket cannot be made.
    pub fn start(export: impl Into<Export>, path: &Path) -> Result<Self, ServerError> {
        let export = export.into();
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(ServerError::PathTooLong {
                path: path.to_owned(),
            });
        }
        let failed = |source| ServerError::Socket {
            path: path.to_owned(),
            source,
        };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) | Err(_) => {}
        }
        let listener = Arc::new(UnixListener::bind(path).map_err(failed)?);
        let clients = Arc::new(Clients::default());
        let server = Self {
            path: path.to_owned(),
            listener: Arc::clone(&listener),
            clients: Arc::clone(&clients),
        };
        thread::Builder::new()
            .name("disk listener".to_owned())
            .spawn(move || accept(&listener, &export, &clients))
            .map_err(failed)?;
        Ok(server)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread that accepts.
        if let Err(errno) = shutdown(self.listener.as_raw_fd(), Shutdown::Both) {
            tracing::warn!(socket = %self.path.display(), %errno, "a disk's socket stays open");
        }
        let mut state = self.clients.lock();
        state.over = true;
        for session in state.sessions.drain(..).filter_map(|s| s.upgrade()) {
            session.cut();
        }
    }
}

impl Clients {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A list and two numbers, each whole in any case.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place. `None` if there is none.
    fn enter(self: &Arc<Self>) -> Option<Place> {
        let mut state = self.lock();
        if state.over || state.count >= MAX_CLIENTS {
            return None;
        }
        state.count += 1;
        Some(Place(Arc::clone(self)))
    }
}

/// A client's place, given back on drop.
struct Place(Arc<Clients>);

impl Place {
    /// Enters a session to be cut at the end. False if that has come.
    fn keep(&self, session: &Arc<Session>) -> bool {
        let mut state = self.0.lock();
        state.sessions.retain(|s| s.strong_count() > 0);
        state.sessions.push(Arc::downgrade(session));
        !state.over
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lock().count -= 1;
    }
}

fn accept(listener: &UnixListener, export: &Export, clients: &Arc<Clients>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) if clients.lock().over => return,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(error) => {
                tracing::warn!(%error, "a client of a disk was not accepted");
                // Out of descriptors, or of memory: some come back.
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let Some(place) = clients.enter() else {
            tracing::warn!(disk = %export.path().display(), "a disk has {MAX_CLIENTS} clients: one more is turned away");
            continue;
        };
        let export = export.clone();
        let spawned = thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || client(export, stream, &place));
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a client of a disk");
        }
    }
}

fn client(export: Export, mut stream: UnixStream, place: &Place) {
    let path = export.path().to_owned();
    let facts = Facts {
        size: export.size(),
        read_only: export.is_read_only(),
    };
    let begun = || -> io::Result<Option<Arc<Session>>> {
        stream.set_read_timeout(Some(HANDSHAKE_WITHIN))?;
        stream.set_write_timeout(Some(HANDSHAKE_WITHIN))?;
        if !negotiate(&mut stream, facts)? {
            return Ok(None);
        }
        stream.set_read_timeout(None)?;
        // A VMM that is stopped by a debugger reads on some day.
        stream.set_write_timeout(None)?;
        Session::new(export, stream).map(Some)
    };
    match begun() {
        Ok(Some(session)) => {
            if place.keep(&session) {
                session.serve();
            }
        }
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(disk = %path.display(), %error, "a client of the disk failed at its handshake");
        }
    }
}
