//! What can go wrong with a VM, one error type an operation.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::qemu::one_line;
use crate::qmp::QmpError;
use crate::spec::SpecError;

/// How much of QEMU's log is looked at for an error, in bytes.
const LOG_TAIL: usize = 2000;

/// A VM was not started; nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The spec or its resources do not make a VM.
    #[error("the VM cannot be described to QEMU")]
    Spec(#[from] SpecError),
    /// Guest memory has another size than the spec.
    #[error("the spec says {spec} bytes of memory, the memory given has {given}")]
    Memory {
        /// Bytes by the spec.
        spec: u64,
        /// Bytes of the memfd.
        given: u64,
    },
    /// A Unix socket's path has at most 107 bytes.
    #[error("{path} is too long for a Unix socket (107 bytes): use a shorter state folder")]
    PathTooLong {
        /// The socket.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// QEMU ended before it could be talked to.
    #[error("QEMU ended at once, saying: {log}")]
    Died {
        /// The end of its log.
        log: String,
    },
    /// It does not know the VM's machine.
    #[error("the QEMU at {path} does not know the machine type {machine} of this VM")]
    Machine {
        /// The binary.
        path: PathBuf,
        /// The VM's machine type.
        machine: String,
    },
    /// A descriptor cannot be put in another's place in it.
    #[error("the QEMU at {path} waits by io_uring, and cannot be given another's TAP")]
    Polling {
        /// The binary.
        path: PathBuf,
    },
    /// QEMU does not do what it is asked at the start.
    #[error("QEMU started but cannot be set up")]
    Setup(#[from] QmpError),
}

/// A VM was not found again.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The process is gone: the guest has ended while no service ran.
    #[error("QEMU process {pid} is gone")]
    Gone {
        /// Its number.
        pid: i32,
    },
    /// A QEMU beside it, which must not run, cannot be ended.
    #[error("cannot end the other QEMU of an upgrade that was cut short")]
    Others {
        /// Why not.
        source: io::Error,
    },
    /// A descriptor cannot be taken back.
    #[error("cannot take the {what} back from QEMU process {pid}")]
    Descriptor {
        /// Which one.
        what: &'static str,
        /// QEMU's number.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
    /// The monitor does not answer.
    #[error("QEMU runs but its monitor does not answer")]
    Monitor(#[from] QmpError),
}

/// A verb failed on a running VM.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// QEMU refuses, is too late, or is gone.
    #[error("cannot {verb} the VM")]
    Qmp {
        /// What was asked.
        verb: &'static str,
        /// Why not.
        source: QmpError,
    },
    /// QEMU answers in a form that is not known.
    #[error("QEMU's answer to `{command}` makes no sense")]
    Strange {
        /// The command.
        command: &'static str,
    },
    /// The process cannot be watched or ended.
    #[error("cannot end QEMU process {pid}")]
    Process {
        /// Its number.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
    /// An aborted save does not come to rest.
    #[error("QEMU did not end its save within {after:?}")]
    Busy {
        /// How long it was waited for.
        after: Duration,
    },
}

/// Saving or loading the device state failed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// QEMU does not take the command.
    #[error("QEMU does not begin to {verb} its device state")]
    Begin {
        /// `save` or `load`.
        verb: &'static str,
        /// Why not.
        source: QmpError,
    },
    /// The state's bytes did not get through on our side.
    #[error("cannot {step}")]
    Stream {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// QEMU gave up.
    #[error("QEMU could not {verb} its device state ({status}): {log}")]
    Failed {
        /// `save` or `load`.
        verb: &'static str,
        /// What it became.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// It took too long.
    #[error("QEMU did not {verb} its device state within {after:?}")]
    Slow {
        /// `save` or `load`.
        verb: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
}

/// A QEMU does not take over from another.
#[derive(Debug, thiserror::Error)]
pub enum SuccessionError {
    /// It cannot be given the guest's TAP.
    #[error("cannot give the TAP to QEMU process {pid}")]
    Tap {
        /// Its number.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
    /// The one before cannot be suspended, or woken.
    #[error("cannot send a signal to QEMU process {pid}")]
    Suspend {
        /// Its number.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
    /// The record that says which one runs the guest cannot be written.
    #[error("cannot write down which QEMU runs the VM")]
    Record(#[source] io::Error),
    /// It does not end.
    #[error("cannot end QEMU process {pid}")]
    Kill {
        /// Its number.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
}

/// The end of QEMU's log in the VM's folder, on one line.
pub(super) fn log_tail(dir: &Path) -> String {
    let bytes = std::fs::read(dir.join(super::LOG)).unwrap_or_default();
    let tail = &bytes[bytes.len().saturating_sub(LOG_TAIL)..];
    one_line(&String::from_utf8_lossy(tail))
}
