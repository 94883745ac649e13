//! From a started QEMU to a [`Vm`]: its monitor, and how it will migrate.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::error::log_tail;
use super::process::Process;
use super::record::VmRecord;
use super::spawn::{self, Birth, Spawned};
use super::{QMP_DEADLINE, QMP_SOCKET, SpawnError, Vm, VmResources};
use crate::qmp::{Qmp, QmpError};
use crate::spec::VmSpec;

/// From exec to the monitor's greeting: firmware and kernel are read from disk, perhaps a slow one.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Kills a QEMU whose start was not finished, also if the caller went away meanwhile.
pub(super) struct Guard {
    process: Arc<Process>,
    record: VmRecord,
    armed: bool,
}

impl Guard {
    pub(super) fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.armed {
            if let Err(error) = self.process.kill_now() {
                tracing::warn!(pid = self.record.pid, %error, "QEMU was not killed");
            }
            self.record.remove();
        }
    }
}

/// Starts QEMU and sets it up. Its guest does not run; the guard kills it unless disarmed.
pub(super) async fn start(
    spec: &VmSpec,
    res: VmResources,
    birth: Birth,
) -> Result<(Vm, Guard), SpawnError> {
    let Spawned {
        process,
        uffd,
        record,
    } = spawn::spawn(spec, &res, birth).await?;
    let process = Arc::new(process);
    let guard = Guard {
        process: Arc::clone(&process),
        record: record.clone(),
        armed: true,
    };
    let qmp = match set_up(&record.dir.join(QMP_SOCKET)).await {
        Ok(qmp) => qmp,
        Err(QmpError::Lost { .. } | QmpError::Connect { .. }) => {
            let log = log_tail(&record.dir);
            return Err(SpawnError::Died { log });
        }
        Err(error) => return Err(error.into()),
    };
    let vm = Vm {
        record,
        process,
        memory: res.memory,
        uffd,
        tap: res.tap,
        park: res.park,
        qmp: Arc::new(qmp),
        throttle: Arc::default(),
    };
    Ok((vm, guard))
}

/// Connects to a new QEMU and tells it how it will migrate.
async fn set_up(socket: &Path) -> Result<Qmp, QmpError> {
    let qmp = Qmp::connect(socket, START_DEADLINE).await?;
    // Guest RAM is shared memory, and moves without QEMU; and its progress comes as events.
    let capabilities = json!({"capabilities": [
        {"capability": "x-ignore-shared", "state": true},
        {"capability": "events", "state": true},
    ]});
    qmp.execute("migrate-set-capabilities", capabilities, QMP_DEADLINE)
        .await?;
    // No throttle, no waiting for convergence, and no announcements by QEMU: those are ours.
    let parameters = json!({
        "max-bandwidth": 1u64 << 40,
        "downtime-limit": 2_000_000,
        "announce-rounds": 0,
    });
    qmp.execute("migrate-set-parameters", parameters, QMP_DEADLINE)
        .await?;
    Ok(qmp)
}
