//! PID 1 of the guest: brings the machine up, runs the pod's containers, and obeys the host.
//!
//! One thread, one loop, no runtime: see [`server`]. Nothing here trusts an image or a container; what
//! the host says is taken at its word.

mod boot;
mod care;
mod cgroups;
mod checks;
mod containers;
mod disks;
mod etc;
mod execs;
mod first;
mod furniture;
mod identity;
mod launch;
mod life;
mod netlink;
mod network;
mod outbox;
mod pod;
mod port;
mod probes;
mod requests;
mod rights;
mod rootfs;
mod server;
mod stats;
mod streams;
mod sys;
mod users;

use std::process::ExitCode;

use anyhow::Result;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("guest-agent is the first process of a VM's guest; it does nothing elsewhere");
        return ExitCode::from(2);
    }
    // PID 1 must not end: the kernel panics, the VM with it, and the console log says why.
    if let Err(error) = run() {
        eprintln!("guest-agent: {error:#}");
    }
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    boot::prepare()?;
    server::Agent::new(port::Port::open()?)?.run()
}
