//! `cargo xtask setup`: what a clean Debian machine lacks. The first run takes minutes, every later one well under a second.
//!
//! The other verbs call it, so `cargo xtask run` or `cargo xtask test` may be the first command on a machine.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::project::Project;
use crate::{cmd, guest, qemu10};

/// The release of bpf-linker that fits aya 0.14: it brings its own LLVM.
const BPF_LINKER: &str = "0.10.3";

/// Arguments of the verb.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// Only print the commands that would run
    #[arg(long)]
    pub no_install: bool,
    /// Also what only the tests need: tools that make container images, and QEMU 10 beside 7.2
    #[arg(long)]
    pub tests: bool,
    /// Also what `cargo xtask test ceph` needs: the daemons and tools of Ceph, and QEMU's driver for it
    #[arg(long)]
    pub ceph: bool,
    /// Also what the benchmarks compare with
    #[arg(long)]
    pub bench: bool,
}

/// One Debian package, and why it is needed.
struct Package {
    name: &'static str,
    /// A program that proves it is there, whoever installed it.
    program: Option<&'static str>,
    why: &'static str,
}

const BASE: &[Package] = &[
    Package {
        name: "gcc",
        program: Some("cc"),
        why: "links Rust programs, and compiles the assembly of ring (TLS)",
    },
    Package {
        name: "libc6-dev",
        program: None,
        why: "C library to link with, also statically for the guest's agent",
    },
    Package {
        name: "qemu-system-x86",
        program: Some("qemu-system-x86_64"),
        why: "runs the VM around each pod",
    },
    Package {
        name: "erofs-utils",
        program: Some("mkfs.erofs"),
        why: "turns a container image into one read-only block device",
    },
    Package {
        name: "e2fsprogs",
        program: Some("mke2fs"),
        why: "makes the file systems of disks that pods write to",
    },
    Package {
        name: "iproute2",
        program: Some("ip"),
        why: "makes the lab's network namespaces",
    },
    Package {
        name: "iperf3",
        program: Some("iperf3"),
        why: "the demo's TCP client",
    },
];

const EBPF: &[Package] = &[
    Package {
        name: "rustc-web",
        program: None,
        why: "compiles the eBPF programs: a rustc that comes with its own library's source",
    },
    Package {
        name: "rust-web-src",
        program: None,
        why: "that source: eBPF needs `core` built anew",
    },
];

const TESTS: &[Package] = &[
    Package {
        name: "skopeo",
        program: Some("skopeo"),
        why: "tests: copies images between layouts",
    },
    Package {
        name: "umoci",
        program: Some("umoci"),
        why: "tests: packs an image that this project did not make",
    },
    Package {
        name: "buildah",
        program: Some("buildah"),
        why: "tests: builds an image of several layers",
    },
    Package {
        name: "docker-registry",
        program: Some("docker-registry"),
        why: "tests: a registry to pull from and push to",
    },
    Package {
        name: "apache2-utils",
        program: Some("htpasswd"),
        why: "tests: the password file of a registry",
    },
    Package {
        name: "mmdebstrap",
        program: Some("mmdebstrap"),
        why: "tests: a Debian system to pack",
    },
    Package {
        name: "redis-tools",
        program: Some("redis-cli"),
        why: "tests: a client whose connection must live through a move",
    },
    Package {
        name: "wrk",
        program: Some("wrk"),
        why: "tests: load on a web server in a pod",
    },
    Package {
        name: "libpq5",
        program: None,
        why: "tests: what PostgreSQL's load generator is linked with",
    },
    Package {
        name: "nftables",
        program: Some("nft"),
        why: "tests: rules that drop what connection tracking does not know",
    },
    Package {
        name: "qemu-utils",
        program: Some("qemu-io"),
        why: "tests: clients of the block server that this project did not write",
    },
    Package {
        name: "conntrack",
        program: Some("conntrack"),
        why: "tests: makes and lists entries of connection tracking, without this project's code",
    },
];

const CEPH: &[Package] = &[
    Package {
        name: "ceph-mon",
        program: Some("ceph-mon"),
        why: "the test of Ceph: a monitor",
    },
    Package {
        name: "ceph-mgr",
        program: Some("ceph-mgr"),
        why: "the test of Ceph: a manager",
    },
    Package {
        name: "ceph-osd",
        program: Some("ceph-osd"),
        why: "the test of Ceph: an OSD",
    },
    Package {
        name: "ceph-common",
        program: Some("rbd"),
        why: "storage classes on Ceph: makes and lists volumes",
    },
    Package {
        name: "qemu-block-extra",
        program: None,
        why: "storage classes on Ceph: QEMU's driver rbd",
    },
];

const BENCH: &[Package] = &[
    Package {
        name: "docker-registry",
        program: Some("docker-registry"),
        why: "benchmarks: a registry that both sides pull from",
    },
    Package {
        name: "podman",
        program: Some("podman"),
        why: "benchmarks: pulls an image and starts it, in folders of its own, to compare with",
    },
    Package {
        name: "runc",
        program: Some("runc"),
        why: "benchmarks: runs podman's containers",
    },
    Package {
        name: "qemu-utils",
        program: Some("qemu-img"),
        why: "benchmarks: asks the block server and QEMU's raw driver for the same",
    },
];

/// The verb.
///
/// # Errors
/// Something is missing and cannot be installed.
pub fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    ensure(project, args)?;
    if !args.no_install {
        println!("setup: everything is there");
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes sure that everything is there.
///
/// # Errors
/// As [`main`].
pub fn ensure(project: &Project, args: &Args) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!(
            "migrator runs on x86_64; this machine is {}",
            std::env::consts::ARCH
        );
    }
    packages(args)?;
    bpf_linker(args)?;
    if args.tests {
        if args.no_install {
            println!(
                "would run: apt-get download of bookworm-backports' qemu-system-x86, and unpack it into the build folder"
            );
        } else {
            qemu10::ensure(project)?;
        }
    }
    guest::ensure(project, args.no_install)
}

fn packages(args: &Args) -> Result<()> {
    let mut wanted: Vec<&Package> = BASE.iter().collect();
    if !nightly_with_source() {
        wanted.extend(EBPF);
    }
    if args.tests {
        wanted.extend(TESTS);
    }
    if args.ceph {
        wanted.extend(CEPH);
    }
    if args.bench {
        wanted.extend(BENCH);
    }
    wanted.retain(|package| {
        package
            .program
            .is_none_or(|program| cmd::which(program).is_none())
    });
    let installed = installed(&wanted)?;
    wanted.retain(|package| !installed.contains(&package.name));
    if wanted.is_empty() {
        return Ok(());
    }
    println!("setup: Debian packages that are missing:");
    for package in &wanted {
        println!("    {:<16} {}", package.name, package.why);
    }
    let mut update = cmd::command("apt-get", ["update", "-qq"]);
    let mut install = cmd::command(
        "apt-get",
        ["install", "-y", "-qq", "--no-install-recommends"],
    );
    install.args(wanted.iter().map(|package| package.name));
    install.env("DEBIAN_FRONTEND", "noninteractive");
    if args.no_install {
        println!(
            "would run: {}\nwould run: {}",
            cmd::show(&update),
            cmd::show(&install)
        );
        return Ok(());
    }
    require_root("to install packages")?;
    cmd::which("apt-get").context(
        "apt-get is not here: setup knows Debian only; install what the list above names by hand",
    )?;
    // A third-party source that is down must not stop us: what matters is whether the install below works.
    if let Err(error) = cmd::run(&mut update) {
        println!("setup: {error:#}; going on with the lists that are there");
    }
    install_packages(&mut install)
}

/// apt-get is quiet unless it fails; `dpkg` is not, so its words are kept for the error.
fn install_packages(install: &mut std::process::Command) -> Result<()> {
    println!("setup: {}", cmd::show(install));
    cmd::output(install).map(drop).context("the packages could not be installed; `apt-get -f install` may repair a half-done installation")
}

/// Of `packages`, the names that dpkg has as installed.
fn installed(packages: &[&Package]) -> Result<Vec<&'static str>> {
    if packages.is_empty() {
        return Ok(Vec::new());
    }
    let mut query = cmd::command(
        "dpkg-query",
        ["--show", "--showformat=${db:Status-Abbrev}${Package}\n"],
    );
    query.args(packages.iter().map(|package| package.name));
    // Fails when any of them is unknown, and still prints the others.
    let output = query
        .output()
        .context("cannot start dpkg-query: setup knows Debian only")?;
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(packages
        .iter()
        .map(|package| package.name)
        .filter(|name| listing.lines().any(|line| line == format!("ii {name}")))
        .collect())
}

/// Whether rustup has a nightly whose library source is there, which is what `-Z build-std` needs.
fn nightly_with_source() -> bool {
    let Ok(sysroot) = cmd::output(&mut cmd::command(
        "rustup",
        ["run", "nightly", "rustc", "--print", "sysroot"],
    )) else {
        return false;
    };
    std::path::Path::new(sysroot.trim())
        .join("lib/rustlib/src/rust/library/core/src/lib.rs")
        .is_file()
}

fn bpf_linker(args: &Args) -> Result<()> {
    if let Some(program) = cmd::which("bpf-linker")
        && cmd::output(std::process::Command::new(program).arg("--version"))
            .is_ok_and(|version| version.contains(BPF_LINKER))
    {
        return Ok(());
    }
    let mut install = cmd::command(
        "cargo",
        ["install", "bpf-linker", "--version", BPF_LINKER, "--locked"],
    );
    // A shared build folder would keep the linker's 300 dependencies for good.
    install.env_remove("CARGO_TARGET_DIR");
    println!("setup: bpf-linker {BPF_LINKER} is missing: links the eBPF programs (about a minute)");
    if args.no_install {
        println!("would run: {}", cmd::show(&install));
        return Ok(());
    }
    cmd::run(&mut install)
}

/// Fails with a message that says why, unless this is root.
///
/// # Errors
/// This is not root.
pub fn require_root(why: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "this needs root {why}: run it as root (`sudo -E env PATH=$PATH cargo xtask ...`), or use `setup --no-install` to see the commands"
        );
    }
    Ok(())
}
