//! Saving and loading the device state: QEMU's own migration, without the RAM.
//!
//! QEMU talks to a Unix socket in the VM's folder, the service pumps between it and the caller's
//! stream. QEMU runs in that folder, so the names it is given are relative.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{sleep, timeout};

use super::error::log_tail;
use super::{ControlError, QMP_DEADLINE, RunState, StateError, Vm};
use crate::qmp::QmpEvent;
use crate::units::Bytes;

/// The socket QEMU saves to.
const SAVE_SOCKET: &str = "save.sock";
/// The socket QEMU loads from.
pub(super) const LOAD_SOCKET: &str = "load.sock";
/// Half a megabyte takes some milliseconds; what takes this long is stuck. A caller with less
/// patience drops the future, which aborts as well.
pub(super) const STATE_DEADLINE: Duration = Duration::from_secs(30);
/// How often to ask for what QEMU has no event for: a matter of a millisecond, and of failed saves.
pub(super) const SETTLE_PERIOD: Duration = Duration::from_millis(2);
/// One read of the state's bytes.
const CHUNK: usize = 256 << 10;

/// A save that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveStats {
    /// Size of the device state.
    pub bytes: Bytes,
    /// From the command to the completed stream.
    pub took: Duration,
}

/// A load that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadStats {
    /// Size of the device state.
    pub bytes: Bytes,
    /// From the first byte of the stream to the VM that is ready to run.
    pub took: Duration,
    /// From the last byte of the stream to the VM that is ready to run.
    pub after_last_byte: Duration,
}

impl Vm {
    /// Saves the device state of the stopped VM into `sink`, and flushes it.
    ///
    /// Afterwards the VM is paused, and either `quit` or `cont` (rollback) is next.
    ///
    /// # Errors
    /// QEMU fails, or the sink does. The save is aborted then, the VM stays paused, and `cont`
    /// works. If the future is dropped instead, call [`Vm::abort_save`] before `cont`.
    pub async fn save_state<W>(&self, sink: &mut W) -> Result<SaveStats, StateError>
    where
        W: AsyncWrite + Unpin + Send,
    {
        let verb = "save";
        let after = STATE_DEADLINE;
        let saved = match timeout(after, self.save(sink)).await {
            Ok(saved) => saved,
            Err(_) => Err(StateError::Slow { verb, after }),
        };
        if saved.is_err()
            && let Err(error) = self.abort_save().await
        {
            tracing::warn!(vm = %self.spec().name, %error, "the failed save was not aborted");
        }
        saved
    }

    async fn save<W>(&self, sink: &mut W) -> Result<SaveStats, StateError>
    where
        W: AsyncWrite + Unpin + Send,
    {
        let verb = "save";
        let began = Instant::now();
        let path = self.dir().join(SAVE_SOCKET);
        remove(&path);
        let listener = UnixListener::bind(&path).map_err(stream("listen for the device state"))?;
        let mut events = self.events();
        let uri = json!({ "uri": format!("unix:{SAVE_SOCKET}") });
        self.qmp
            .execute("migrate", uri, QMP_DEADLINE)
            .await
            .map_err(|source| StateError::Begin { verb, source })?;
        let copy = async {
            let (mut from, _) = listener
                .accept()
                .await
                .map_err(stream("accept QEMU's connection"))?;
            remove(&path);
            pump(&mut from, sink).await
        };
        let (bytes, ()) = tokio::try_join!(copy, self.ended(verb, &mut events))?;
        Ok(SaveStats {
            bytes,
            took: began.elapsed(),
        })
    }

    /// Ends a save that failed, or whose service was killed; the VM is paused then, and `cont`
    /// works. Without a save under way it does nothing.
    ///
    /// # Errors
    /// QEMU is gone, silent, or does not come to rest.
    pub async fn abort_save(&self) -> Result<(), ControlError> {
        self.command("migrate_cancel").await?;
        let rest = async {
            loop {
                let answer = self.command("query-migrate").await?;
                let ended = match answer.get("status").and_then(Value::as_str) {
                    None | Some("none" | "completed" | "failed" | "cancelled") => true,
                    Some(_) => false,
                };
                // QEMU says that the save has failed a moment before it leaves this state.
                if ended && self.query_status().await? != RunState::Saving {
                    return Ok(());
                }
                sleep(SETTLE_PERIOD).await;
            }
        };
        match timeout(QMP_DEADLINE, rest).await {
            Ok(result) => result,
            Err(_) => Err(ControlError::Busy {
                after: QMP_DEADLINE,
            }),
        }
    }

    /// Loads into an incoming VM what `source` gives until its end. The VM is paused afterwards,
    /// and `cont` makes it run. Guest memory must be the source's before the first byte comes:
    /// virtio devices read their rings while they load, and refuse what does not fit.
    ///
    /// Call it before the source is frozen, with a `source` that has nothing yet: QEMU then
    /// listens already when the first byte comes. The deadline runs from that byte.
    ///
    /// # Errors
    /// QEMU fails, or the source does. The VM cannot be used any more then: kill it.
    pub async fn load_state<R>(&self, source: &mut R) -> Result<LoadStats, StateError>
    where
        R: AsyncRead + Unpin + Send,
    {
        let verb = "load";
        let path = self.dir().join(LOAD_SOCKET);
        remove(&path);
        let mut events = self.events();
        let uri = json!({ "uri": format!("unix:{LOAD_SOCKET}") });
        self.qmp
            .execute("migrate-incoming", uri, QMP_DEADLINE)
            .await
            .map_err(|source| StateError::Begin { verb, source })?;
        let to = UnixStream::connect(&path)
            .await
            .map_err(stream("connect to the loading QEMU"))?;
        remove(&path);
        let mut buffer = vec![0; CHUNK];
        let waiting = async {
            let got = source.read(&mut buffer).await;
            got.map_err(stream("read the device state"))
        };
        // A QEMU that dies while it waits ends this, too.
        let got = tokio::select! {
            got = waiting => got?,
            Err(error) = self.ended(verb, &mut events) => return Err(error),
        };
        let after = STATE_DEADLINE;
        let copied = self.fill(buffer[..got].chain(source), to, &mut events);
        match timeout(after, copied).await {
            Ok(loaded) => loaded,
            Err(_) => Err(StateError::Slow { verb, after }),
        }
    }

    /// Passes the state on to the loading QEMU, and awaits that it has loaded it.
    async fn fill<R>(
        &self,
        mut source: R,
        mut to: UnixStream,
        events: &mut broadcast::Receiver<QmpEvent>,
    ) -> Result<LoadStats, StateError>
    where
        R: AsyncRead + Unpin + Send,
    {
        let began = Instant::now();
        let copy = async {
            let bytes = pump(&mut source, &mut to).await?;
            // QEMU knows the end of the state by its content; EOF only cuts a broken one short.
            to.shutdown()
                .await
                .map_err(stream("end the device state"))?;
            Ok((bytes, Instant::now()))
        };
        let ((bytes, last), ()) = tokio::try_join!(copy, self.ended("load", events))?;
        Ok(LoadStats {
            bytes,
            took: began.elapsed(),
            after_last_byte: last.elapsed(),
        })
    }

    /// Awaits the end of the migration that QEMU was told to do.
    pub(super) async fn ended(
        &self,
        verb: &'static str,
        events: &mut broadcast::Receiver<QmpEvent>,
    ) -> Result<(), StateError> {
        let failed = |status: &str| StateError::Failed {
            verb,
            status: status.to_owned(),
            log: log_tail(self.dir()),
        };
        loop {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return Err(failed("QEMU died")),
            };
            if event.name != "MIGRATION" {
                continue;
            }
            match event.data.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some(status @ ("failed" | "cancelled")) => return Err(failed(status)),
                Some(_) | None => {}
            }
        }
    }
}

/// Copies until the end, and flushes.
async fn pump<R, W>(from: &mut R, to: &mut W) -> Result<Bytes, StateError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    loop {
        let got = from
            .read(&mut buffer)
            .await
            .map_err(stream("read the device state"))?;
        if got == 0 {
            break;
        }
        to.write_all(&buffer[..got])
            .await
            .map_err(stream("pass the device state on"))?;
        total += got as u64;
    }
    to.flush()
        .await
        .map_err(stream("pass the device state on"))?;
    Ok(Bytes(total))
}

/// A socket that was used once, or was left by a killed service.
fn remove(path: &Path) {
    let _ = std::fs::remove_file(path);
}

fn stream(step: &'static str) -> impl Fn(io::Error) -> StateError {
    move |source| StateError::Stream { step, source }
}
