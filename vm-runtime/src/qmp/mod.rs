//! A small QMP client: JSON lines over a Unix socket (QEMU's docs/interop/qmp-spec).
//!
//! Two tasks own the socket's halves, so that a caller who gives up in the middle of a command
//! leaves no half-written line. Replies find their caller by `id`; events go to whoever listens.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The longest line taken from the VMM: it may be in a hostile guest's hands.
const MAX_LINE: u64 = 4 << 20;
/// Events kept for a slow listener before it misses some.
const EVENTS: usize = 256;

/// A QMP command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The monitor's socket cannot be reached.
    #[error("cannot connect to the QEMU monitor {path}")]
    Connect {
        /// The socket.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// What answers is no QMP server.
    #[error("the QEMU monitor sent no greeting that makes sense: {got}")]
    Greeting {
        /// What came.
        got: String,
    },
    /// QEMU said no.
    #[error("QEMU refused `{command}` ({class}): {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QMP error class, such as `GenericError`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer `{command}` within {after:?}")]
    Timeout {
        /// The command.
        command: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The connection ended: QEMU has died, or somebody else holds its monitor.
    #[error("the QEMU monitor was lost at `{command}`: QEMU has probably died")]
    Lost {
        /// The command.
        command: String,
    },
}

impl QmpError {
    /// Whether QEMU understood the command and said no.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// Something that happened in QEMU.
#[derive(Clone, Debug)]
pub struct QmpEvent {
    /// Its name, such as `STOP` or `MIGRATION`.
    pub name: String,
    /// Its data; null if it has none.
    pub data: Value,
    /// When, by QEMU's reading of the host's clock, in microseconds of Unix time; 0 if it does not know.
    pub at_unix_us: u64,
}

/// The `timestamp` of an event (docs/interop/qmp-spec): both -1 if the host's clock could not be read.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    fn unix_us(self) -> u64 {
        let seconds = u64::try_from(self.seconds).unwrap_or(0);
        let microseconds = u64::try_from(self.microseconds).unwrap_or(0);
        seconds
            .saturating_mul(1_000_000)
            .saturating_add(microseconds)
    }
}

/// One line from QEMU.
#[derive(Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return")]
    reply: Option<Value>,
    error: Option<WireError>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    timestamp: Timestamp,
}

#[derive(Clone, Debug, Deserialize)]
struct WireError {
    class: String,
    desc: String,
}

type Reply = Result<Value, WireError>;

#[derive(Debug)]
struct Shared {
    /// `None` once the connection has ended.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Reply>>>>,
    /// `None` once the connection has ended.
    events: Mutex<Option<broadcast::Sender<QmpEvent>>>,
    /// The reason in the last `SHUTDOWN` event.
    shutdown: Mutex<Option<String>>,
}

/// A connection to one QEMU's monitor, past capabilities negotiation.
#[derive(Debug)]
pub struct Qmp {
    shared: Arc<Shared>,
    lines: mpsc::UnboundedSender<String>,
    next_id: AtomicU64,
    tasks: [JoinHandle<()>; 2],
}

impl Qmp {
    /// Connects, awaits the greeting, and leaves negotiation mode, all within `deadline`.
    ///
    /// # Errors
    /// Nobody listens, no greeting, or too late (QEMU serves one monitor client at a time).
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        match timeout(deadline, Self::negotiate(path, deadline)).await {
            Ok(done) => done,
            Err(_) => Err(QmpError::Timeout {
                command: "qmp_capabilities".to_owned(),
                after: deadline,
            }),
        }
    }

    async fn negotiate(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| QmpError::Connect {
                path: path.display().to_string(),
                source,
            })?;
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        let greeting = match next_line(&mut read).await {
            Ok(Some(line)) => line,
            Ok(None) | Err(_) => {
                return Err(QmpError::Lost {
                    command: "connect".to_owned(),
                });
            }
        };
        let parsed: Value = serde_json::from_slice(&greeting).unwrap_or_default();
        if parsed.get("QMP").is_none() {
            return Err(QmpError::Greeting {
                got: String::from_utf8_lossy(&greeting[..greeting.len().min(200)]).into_owned(),
            });
        }
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Some(HashMap::new())),
            events: Mutex::new(Some(broadcast::channel(EVENTS).0)),
            shutdown: Mutex::new(None),
        });
        let (lines, outgoing) = mpsc::unbounded_channel();
        let qmp = Self {
            tasks: [
                tokio::spawn(read_loop(read, Arc::clone(&shared))),
                tokio::spawn(write_loop(write, outgoing)),
            ],
            shared,
            lines,
            next_id: AtomicU64::new(1),
        };
        qmp.execute("qmp_capabilities", Value::Null, deadline)
            .await?;
        Ok(qmp)
    }

    /// Runs one command and gives back its return value. `arguments` is an object, or null.
    ///
    /// # Errors
    /// QEMU refuses, is too late, or is gone. After a timeout the command may still take effect.
    pub async fn execute(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        let lost = || QmpError::Lost {
            command: command.to_owned(),
        };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = oneshot::channel();
        match &mut *lock(&self.shared.waiting) {
            Some(waiting) => waiting.insert(id, sender),
            None => return Err(lost()),
        };
        let mut line = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            line["arguments"] = arguments;
        }
        self.lines.send(format!("{line}\n")).map_err(|_| lost())?;
        let answered = timeout(deadline, reply).await;
        if let Some(waiting) = &mut *lock(&self.shared.waiting) {
            waiting.remove(&id);
        }
        match answered {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(QmpError::Refused {
                command: command.to_owned(),
                class: error.class,
                desc: error.desc,
            }),
            Ok(Err(_)) => Err(lost()),
            Err(_) => Err(QmpError::Timeout {
                command: command.to_owned(),
                after: deadline,
            }),
        }
    }

    /// Events from now on. The receiver ends when the connection does.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        match &*lock(&self.shared.events) {
            Some(events) => events.subscribe(),
            // Its sender is gone already: it ends at once.
            None => broadcast::channel(1).1,
        }
    }

    /// The reason of the guest's end that QEMU gave, such as `guest-shutdown`, if any so far.
    pub fn shutdown_reason(&self) -> Option<String> {
        lock(&self.shared.shutdown).clone()
    }

    /// Whether the connection has ended.
    pub fn is_lost(&self) -> bool {
        lock(&self.shared.waiting).is_none()
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn write_loop(mut write: OwnedWriteHalf, mut lines: mpsc::UnboundedReceiver<String>) {
    while let Some(line) = lines.recv().await {
        if write.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn read_loop(mut read: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    loop {
        match next_line(&mut read).await {
            Ok(Some(line)) => match serde_json::from_slice::<Line>(&line) {
                Ok(line) => dispatch(line, &shared),
                Err(error) => tracing::warn!(%error, "QEMU sent a line that is no QMP"),
            },
            Ok(None) => break,
            Err(error) => {
                tracing::debug!(%error, "the QEMU monitor's connection failed");
                break;
            }
        }
    }
    // Dropping the senders tells every waiting caller that the connection is lost.
    *lock(&shared.waiting) = None;
    *lock(&shared.events) = None;
}

fn dispatch(line: Line, shared: &Shared) {
    if let Some(name) = line.event {
        if name == "SHUTDOWN" {
            let reason = line.data.get("reason").and_then(Value::as_str);
            *lock(&shared.shutdown) = reason.map(str::to_owned);
        }
        if let Some(events) = &*lock(&shared.events) {
            // Nobody listening is fine.
            let _ = events.send(QmpEvent {
                name,
                data: line.data,
                at_unix_us: line.timestamp.unix_us(),
            });
        }
        return;
    }
    let reply = match (line.error, line.reply) {
        (Some(error), _) => Err(error),
        (None, Some(value)) => Ok(value),
        (None, None) => return,
    };
    let caller = line
        .id
        .and_then(|id| lock(&shared.waiting).as_mut()?.remove(&id));
    if let Some(caller) = caller {
        // The caller may have given up: its deadline has passed.
        let _ = caller.send(reply);
    }
}

/// The next line, without allocating more than [`MAX_LINE`] for it. `None` at the end.
async fn next_line(read: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let got = read.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    if got == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the line is cut, or too long",
        ));
    }
    Ok(Some(line))
}

/// Locks a mutex whose data cannot be left inconsistent by a panic.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
