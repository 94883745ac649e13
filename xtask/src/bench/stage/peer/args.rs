//! The command line of a QEMU that migrates by itself: ours, but for what our own engine needs. Pure.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Result, ensure};
use vm_runtime::command_line::{self, Local};
use vm_runtime::spec::VmSpec;

/// Names of the TLS objects for either end of a connection.
pub(super) const TLS_SERVER: &str = "tls-server";
pub(super) const TLS_CLIENT: &str = "tls-client";

/// The node of the writable disk, as our command line names it.
pub(super) const WRITABLE_NODE: &str = "writable0";

/// What guest RAM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Memory {
    /// QEMU's default: anonymous memory of the process.
    Private,
    /// A memfd, and every other RAM block one too: what cpr-transfer needs.
    Shared,
}

/// Where the guest comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Incoming<'a> {
    /// It boots.
    Boot,
    /// From a migration that is told of by QMP.
    Defer,
    /// From another process on this host, by cpr-transfer: the sockets of its two channels.
    Cpr { main: &'a str, cpr: &'a str },
}

/// What differs from our own command line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape<'a> {
    pub(super) memory: Memory,
    pub(super) incoming: Incoming<'a>,
    /// The TAP's name in the namespace that QEMU runs in.
    pub(super) tap: &'a str,
    /// A folder with certificates, in QEMU's naming.
    pub(super) tls: &'a Path,
    /// The file of the writable disk, where the guest has one.
    pub(super) writable: Option<&'a Path>,
}

/// QEMU's arguments.
///
/// # Errors
/// The spec is wrong, or our command line no longer has a part that is replaced here.
pub(super) fn build(spec: &VmSpec, local: &Local<'_>, shape: Shape<'_>) -> Result<Vec<OsString>> {
    let mut args = command_line::build(spec, local)?;
    // Nobody waits between boot and run, nor between load and run: QEMU goes on by itself.
    let paused = args.iter().position(|arg| arg == "-S");
    ensure!(paused.is_some(), "our command line has no -S any more");
    paused.map(|at| args.remove(at));
    let size = spec.memory.0;
    let (ram, machine) = match shape.memory {
        Memory::Private => (format!("memory-backend-ram,id=ram,size={size}"), ""),
        Memory::Shared => (
            format!("memory-backend-memfd,id=ram,size={size},share=on"),
            ",aux-ram-share=on",
        ),
    };
    replace(&mut args, "memory-backend-file,id=ram,", |_| ram)?;
    replace(&mut args, "tap,id=net0,fd=", |_| {
        format!(
            "tap,id=net0,ifname={},script=no,downscript=no,vhost=off",
            shape.tap
        )
    })?;
    if let Some(file) = shape.writable {
        // Ours is served by the service.
        replace(&mut args, r#"{"discard":"unmap","driver":"nbd","#, |_| {
            serde_json::json!({
                "driver": "raw",
                "discard": "unmap",
                "node-name": WRITABLE_NODE,
                "file": { "driver": "file", "discard": "unmap", "filename": file.to_string_lossy() },
            })
            .to_string()
        })?;
    }
    replace(&mut args, &spec.machine, |ours| format!("{ours}{machine}"))?;
    for (id, endpoint) in [(TLS_SERVER, "server"), (TLS_CLIENT, "client")] {
        // Its own check of certificates wants more key usages than TLS 1.3 does, and the lab's have only those.
        args.extend(["-object".into(), {
            let mut object = OsString::from(format!(
                "tls-creds-x509,id={id},endpoint={endpoint},verify-peer=on,sanity-check=off,dir="
            ));
            object.push(shape.tls);
            object
        }]);
    }
    let incoming: Vec<String> = match shape.incoming {
        Incoming::Boot => Vec::new(),
        Incoming::Defer => vec!["defer".to_owned()],
        Incoming::Cpr { main, cpr } => vec![
            format!("unix:{main}"),
            serde_json::json!({ "channel-type": "cpr", "addr": unix(cpr) }).to_string(),
        ],
    };
    for channel in incoming {
        args.extend(["-incoming".into(), channel.into()]);
    }
    Ok(args)
}

/// A Unix socket as a `MigrationAddress` of QEMU's QAPI schema.
pub(super) fn unix(path: &str) -> serde_json::Value {
    serde_json::json!({ "transport": "socket", "type": "unix", "path": path })
}

/// Rewrites the one argument that begins so.
fn replace(args: &mut [OsString], start: &str, rewrite: impl FnOnce(&str) -> String) -> Result<()> {
    let mut found = args
        .iter_mut()
        .filter(|arg| arg.to_str().is_some_and(|text| text.starts_with(start)));
    let (only, second) = (found.next(), found.next());
    match (only, second) {
        (Some(arg), None) => {
            let text = rewrite(arg.to_str().unwrap_or_default());
            *arg = text.into();
            Ok(())
        }
        (None, _) | (_, Some(_)) => {
            anyhow::bail!("our command line has not exactly one argument {start}...")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use vm_runtime::command_line::{BootMode, FdNumbers};
    use vm_runtime::spec::{Accel, CPU, KERNEL_CMDLINE, MACHINE};
    use vm_runtime::units::Bytes;

    use super::*;

    fn text(memory: Memory, incoming: Incoming<'_>) -> Vec<String> {
        let spec = VmSpec {
            name: "peer".to_owned(),
            uuid: "8a5e2f0c-0000-4000-8000-000000000001".to_owned(),
            machine: MACHINE.to_owned(),
            cpu: CPU.to_owned(),
            accel: Accel::Tcg,
            memory: Bytes::mib(256),
            vcpus: 1,
            mac: "52:54:00:12:34:56".parse().unwrap(),
            disks: Vec::new(),
            writable: Vec::new(),
            cmdline: KERNEL_CMDLINE.to_owned(),
            kernel_sha256: String::new(),
            initramfs_sha256: String::new(),
            free_page_reporting: true,
            announced_images: false,
            hugepages: false,
        };
        let local = Local {
            mode: BootMode::Boot,
            fds: FdNumbers {
                memory: -1,
                tap: -1,
                qmp: 7,
                agent: 8,
            },
            kernel: Path::new("/k"),
            initramfs: Path::new("/i"),
            disks: &Vec::<PathBuf>::new(),
            data_dirs: &[],
            rbd: &[],
        };
        let shape = Shape {
            memory,
            incoming,
            tap: "t0",
            tls: Path::new("/tls"),
            writable: None,
        };
        let args = build(&spec, &local, shape).unwrap();
        args.into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect()
    }

    #[test]
    fn only_memory_tap_and_start_differ_from_our_command_line() {
        let args = text(Memory::Private, Incoming::Defer);
        let has = |wanted: &str| args.iter().any(|arg| arg == wanted);
        assert!(has("memory-backend-ram,id=ram,size=268435456"), "{args:?}");
        assert!(has(
            "tap,id=net0,ifname=t0,script=no,downscript=no,vhost=off"
        ));
        assert!(!has("-S"));
        assert!(has("socket,id=qmp,fd=7,server=on,wait=off"));
        assert_eq!(args[args.len() - 2..], ["-incoming", "defer"]);
        assert!(!args.iter().any(|arg| arg.contains("memory-backend-file")));
        assert!(!args.iter().any(|arg| arg.contains("aux-ram-share")));
    }

    #[test]
    fn cpr_shares_all_ram_and_has_two_channels() {
        let incoming = Incoming::Cpr {
            main: "m.sock",
            cpr: "c.sock",
        };
        let args = text(Memory::Shared, incoming);
        assert!(args.iter().any(|arg| arg.ends_with(",aux-ram-share=on")));
        let channels: Vec<&String> = args
            .iter()
            .zip(args.iter().skip(1))
            .filter(|(flag, _)| *flag == "-incoming")
            .map(|(_, channel)| channel)
            .collect();
        assert_eq!(channels[0], "unix:m.sock");
        let cpr: serde_json::Value = serde_json::from_str(channels[1]).unwrap();
        assert_eq!(cpr["channel-type"], "cpr");
        assert_eq!(cpr["addr"]["path"], "c.sock");
    }
}
