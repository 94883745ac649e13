//! Device state between QEMU's stream and control messages.

use bytes::Bytes;
use tokio::io::{AsyncReadExt, duplex};
use vm_runtime::vm::{StateError, Vm};

use crate::wire::conn::LinkError;
use crate::wire::control::ControlSender;
use crate::wire::message::{StateBegin, StateChunk, StateEnd};

/// The most device state that a destination takes: q35 with a few devices has half a megabyte.
pub(super) const MAX_STATE: usize = 64 << 20;

/// The device state could not be saved or sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum SaveError {
    /// QEMU did not save it.
    #[error("the VM's device state could not be saved")]
    Vm(#[from] StateError),
    /// The control connection is lost.
    #[error("the connection to the destination was lost while the device state was sent")]
    Link(#[from] LinkError),
    /// The pipe between the two halves broke.
    #[error("the VM's device state could not be read")]
    Pipe(#[from] std::io::Error),
}

/// Saves the stopped VM's device state and sends it, piece by piece while it is being saved. Returns its
/// size in bytes. The VM stays stopped, whatever happens.
pub(super) async fn save(vm: &Vm, control: &ControlSender) -> Result<u64, SaveError> {
    let (mut sink, mut source) = duplex(StateChunk::MAX);
    control.send(StateBegin).await?;
    let saving = async {
        let saved = vm.save_state(&mut sink).await;
        drop(sink);
        saved.map_err(SaveError::from)
    };
    let sending = async {
        let mut total = 0u64;
        let mut buffer = vec![0u8; StateChunk::MAX];
        loop {
            let n = source.read(&mut buffer).await?;
            if n == 0 {
                return Ok::<u64, SaveError>(total);
            }
            total += n as u64;
            let chunk = Bytes::copy_from_slice(&buffer[..n]);
            control.send(StateChunk(chunk)).await?;
        }
    };
    let (_, bytes) = tokio::try_join!(saving, sending)?;
    control.send(StateEnd { bytes }).await?;
    Ok(bytes)
}
