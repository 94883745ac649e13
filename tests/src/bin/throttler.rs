//! Throttles the VM of a folder until it is killed: what a service does that is killed in the middle of a migration.
//!
//!     throttler DIR groups|slices PERCENT
//!
//! Prints `throttled` when it is, and `stopped` whenever QEMU has stopped the guest.

use std::future::pending;
use std::path::Path;

use anyhow::{Result, bail};
use vm_runtime::vm::throttle::{Means, Percent, Throttle};
use vm_runtime::vm::{Vm, VmRecord};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [dir, means, percent] = words.as_slice() else {
        bail!("needs a folder, the means, and a percentage");
    };
    let means = match means.as_str() {
        "groups" => Means::Groups,
        "slices" => Means::Slices,
        other => bail!("no means: {other}"),
    };
    let vm = Vm::attach(&VmRecord::load(Path::new(dir))?).await?;
    let mut events = vm.events();
    let throttle = Throttle::by(&vm, means).await?;
    throttle.set(Percent::clamp(percent.parse()?)).await?;
    println!("throttled");
    while let Ok(event) = events.recv().await {
        if event.name == "STOP" {
            println!("stopped");
        }
    }
    pending().await
}
