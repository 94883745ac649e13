//! A VMM that awaits a state, and the memory that is filled meanwhile.

use anyhow::Result;
use vm_runtime::units::{PAGE_SIZE, PageIndex};
use vm_runtime::vm::{RunState, Vm};

use crate::lab::{Lab, hashes};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_memory_is_left_alone_until_a_state_comes() -> Result<()> {
    let lab = Lab::new().await?;
    let other = lab.other_qemu().await?;
    for (index, qemu) in [Some(&lab.qemu), other.as_ref()]
        .into_iter()
        .flatten()
        .enumerate()
    {
        // Not even firmware goes into it: a page that is a hole at the source is none that is sent.
        let vm = Vm::incoming(&lab.spec(), lab.resources(&format!("empty{index}"), qemu)?).await?;
        assert_eq!(vm.query_status().await?, RunState::Incoming);
        assert_eq!(vm.memory().data_ranges()?, []);
        vm.kill().await?;

        // Nor over what is there already, wherever that is.
        let resources = lab.resources(&format!("full{index}"), qemu)?;
        let memory = resources.memory.clone();
        for page in 0..memory.pages() {
            let mut bytes = [0xa5; PAGE_SIZE];
            bytes[..8].copy_from_slice(&page.to_le_bytes());
            memory.write(PageIndex(page), &bytes)?;
        }
        let before = hashes(&memory)?;
        let vm = Vm::incoming(&lab.spec(), resources).await?;
        assert_eq!(vm.query_status().await?, RunState::Incoming);
        assert!(
            hashes(&memory)? == before,
            "{:?} wrote into it",
            qemu.version
        );
        vm.kill().await?;
    }
    Ok(())
}
