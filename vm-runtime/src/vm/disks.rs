//! What a guest that was started from a template has to be told of its disks.

use serde_json::{Value, json};

use super::{ControlError, QMP_DEADLINE, Vm};
use crate::command_line::is_disk;

impl Vm {
    /// Has the guest look at the sizes of its disks: a template's are empty. It gets an interrupt for each of them when it runs.
    ///
    /// # Errors
    /// QEMU refuses, is gone or silent.
    pub async fn announce_disks(&self) -> Result<(), ControlError> {
        let command = "query-named-block-nodes";
        let nodes = self.tell(command, json!({ "flat": true })).await?;
        let nodes = nodes.as_array().ok_or(ControlError::Strange { command })?;
        for (name, size) in nodes.iter().filter_map(disk) {
            // To the size that it has: QEMU tells the guest whatever comes of it.
            let size = json!({ "node-name": name, "size": size });
            self.tell("block_resize", size).await?;
        }
        Ok(())
    }

    async fn tell(&self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        let verb = "tell the sizes of disks to";
        let answer = self.qmp.execute(command, arguments, QMP_DEADLINE).await;
        answer.map_err(|source| ControlError::Qmp { verb, source })
    }
}

/// The name of a disk's node, and its size in bytes. `None`: it is the node of something else.
fn disk(node: &Value) -> Option<(&str, u64)> {
    let name = node.get("node-name")?.as_str()?;
    let size = node.get("image")?.get("virtual-size")?.as_u64()?;
    is_disk(name).then_some((name, size))
}
