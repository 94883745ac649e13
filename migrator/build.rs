//! Builds the dataplane programs for the kernel's own machine, and leaves the object in `OUT_DIR`.
//!
//! That target has no prebuilt `core`, so it takes a compiler that comes with its library's source:
//! a rustup nightly with `rust-src`, else Debian's `rustc-web` with `rust-web-src`. Cargo is the one
//! that runs this script, in both cases but the first.

use std::env;
use std::error::Error;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAMS: &str = "migrator-ebpf";
const TARGET: &str = "bpfel-unknown-none";
const LINKER: &str = "bpf-linker";

/// Debian's compiler, and where `rust-web-src` puts its library.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

const NO_COMPILER: &str = "\
the eBPF programs need a Rust compiler with the source of its standard library, and there is none here. Either:
    apt-get install rustc-web rust-web-src
or, with rustup:
    rustup toolchain install nightly --component rust-src
(`cargo xtask setup` does the first)";

const NO_LINKER: &str = "\
the eBPF programs need bpf-linker, which is not on the PATH nor in Cargo's bin folder:
    cargo install bpf-linker --version 0.10.3 --locked
(`cargo xtask setup` does it)";

/// Settings of the outer build that must not reach the inner one. Where to find registries must.
const KEPT: [&str; 6] = [
    "CARGO_HOME",
    "CARGO_NET_",
    "CARGO_HTTP_",
    "CARGO_REGISTR",
    "CARGO_SOURCE_",
    "CARGO_TERM_",
];
const CLEARED: [&str; 8] = [
    "RUSTC",
    "RUSTFLAGS",
    "RUSTDOC",
    "RUSTDOCFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTUP_TOOLCHAIN",
    "MAKEFLAGS",
];

fn main() -> Result<(), Box<dyn Error>> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no manifest dir")?);
    let programs = manifest.join("..").join(PROGRAMS);
    for watched in ["src", "Cargo.toml"] {
        println!(
            "cargo::rerun-if-changed={}",
            programs.join(watched).display()
        );
    }
    println!("cargo::rerun-if-changed=build.rs");

    let Some(linker) = find_linker() else {
        return fail(NO_LINKER);
    };
    let Some(compiler) = find_compiler()? else {
        return fail(NO_COMPILER);
    };
    let target_dir = out_dir.join("ebpf");
    let status = compiler
        .cargo(&linker)
        .arg("build")
        .arg("--release")
        .args(["-Z", "build-std=core", "--target", TARGET])
        .args(["--bin", PROGRAMS, "--features", "programs"])
        .arg("--manifest-path")
        .arg(programs.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .status()?;
    if !status.success() {
        return fail(&format!(
            "building the eBPF programs with {compiler:?} failed ({status}); its messages are above"
        ));
    }
    let object = target_dir.join(TARGET).join("release").join(PROGRAMS);
    std::fs::copy(&object, out_dir.join("programs.o"))
        .map_err(|error| format!("{}: {error}", object.display()))?;
    Ok(())
}

fn fail(message: &str) -> Result<(), Box<dyn Error>> {
    for line in message.lines() {
        println!("cargo::error={line}");
    }
    Err("the eBPF programs were not built".into())
}

/// A compiler that has its library's source, and the cargo that drives it.
#[derive(Debug)]
enum Compiler {
    /// A rustup toolchain, with its own cargo.
    Rustup(String),
    /// Debian's compiler, told to accept unstable options, with the cargo that runs this script.
    Debian,
}

impl Compiler {
    fn cargo(&self, linker: &Path) -> Command {
        let mut command = match self {
            Self::Rustup(toolchain) => {
                let mut command = Command::new("rustup");
                clear_environment(&mut command);
                command.args(["run", toolchain, "cargo"]);
                command
            }
            Self::Debian => {
                let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
                let mut command = Command::new(cargo);
                clear_environment(&mut command);
                command.env("RUSTC", DEBIAN_RUSTC);
                command.env("RUSTC_BOOTSTRAP", "1");
                command
            }
        };
        // Set even when empty: it takes precedence over every other place that flags can come from.
        let flags = format!("-Clinker={}", linker.display());
        command.env("CARGO_ENCODED_RUSTFLAGS", flags);
        command
    }
}

fn clear_environment(command: &mut Command) {
    for (key, _) in env::vars_os() {
        let Some(name) = key.to_str() else { continue };
        let inherited = name.starts_with("CARGO") && !KEPT.iter().any(|k| name.starts_with(k));
        if inherited || CLEARED.contains(&name) {
            command.env_remove(&key);
        }
    }
}

fn find_compiler() -> Result<Option<Compiler>, Box<dyn Error>> {
    if let Some(list) = output("rustup", &["toolchain", "list", "--quiet"])
        .or_else(|| output("rustup", &["toolchain", "list"]))
    {
        for toolchain in list.lines().filter_map(|l| l.split_whitespace().next()) {
            if !toolchain.starts_with("nightly") {
                continue;
            }
            let sysroot = output("rustup", &["run", toolchain, "rustc", "--print", "sysroot"]);
            if sysroot.is_some_and(|sysroot| has_source(Path::new(sysroot.trim()))) {
                return Ok(Some(Compiler::Rustup(toolchain.to_owned())));
            }
        }
    }
    // `core_intrinsics` has the shape that the programs use since 1.90.
    let usable = output(DEBIAN_RUSTC, &["--version"])
        .and_then(|version| minor_version(&version))
        .is_some_and(|minor| minor >= 90);
    let sysroot = output(DEBIAN_RUSTC, &["--print", "sysroot"]);
    if usable && sysroot.is_some_and(|sysroot| has_source(Path::new(sysroot.trim()))) {
        return Ok(Some(Compiler::Debian));
    }
    Ok(None)
}

fn has_source(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib/src/rust/library/core/src/lib.rs")
        .is_file()
}

/// `rustc 1.96.0 (...)` is 96.
fn minor_version(text: &str) -> Option<u32> {
    let version = text.strip_prefix("rustc 1.")?;
    version.split('.').next()?.parse().ok()
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    clear_environment(&mut command);
    let output = command.args(arguments).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn find_linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"));
    let cargo_bins = [cargo_home, home].into_iter().flatten();
    env::split_paths::<OsStr>(&path)
        .chain(cargo_bins.map(|folder| folder.join("bin")))
        .map(|folder| folder.join(LINKER))
        .find(|candidate| candidate.is_file())
        .map(|linker| std::fs::canonicalize(&linker).unwrap_or(linker))
}
