//! A real registry on loopback: Debian's docker-registry, with what stands between it and a node.

mod liar;
mod relay;
mod token;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use xtask::cmd;
use xtask::process::poll_until;

pub use liar::{Liar, answer};
pub use relay::{Fault, Relay};
pub use token::TokenServer;

const COMES_UP_WITHIN: Duration = Duration::from_secs(30);

/// The address in names and certificates.
const HOST: &str = "127.0.0.1";

/// What a registry asks of its clients.
#[derive(Default)]
pub struct Setup<'a> {
    /// User and password.
    pub password: Option<(&'a str, &'a str)>,
    /// TLS, with a certificate of an authority that only [`Registry::ca`] knows.
    pub tls: bool,
    /// Tokens of this server.
    pub token: Option<&'a TokenServer>,
}

/// A registry that ends with its guard.
pub struct Registry {
    child: Child,
    address: String,
    dir: TempDir,
}

impl Registry {
    /// Starts one that is open to everybody.
    ///
    /// # Errors
    /// It is not installed, or does not come up.
    pub fn open() -> Result<Self> {
        Self::start(&Setup::default())
    }

    /// Starts one.
    ///
    /// # Errors
    /// As [`Registry::open`].
    pub fn start(setup: &Setup<'_>) -> Result<Self> {
        let dir = TempDir::new()?;
        let config = dir.path().join("config.yml");
        fs::write(&config, configuration(setup, dir.path())?)?;
        let log = dir.path().join("log");
        let file = File::create(&log)?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("cannot start docker-registry: `cargo xtask setup --tests` installs it")?;
        let mut registry = Self {
            child,
            address: String::new(),
            dir,
        };
        let mut port = None;
        poll_until(COMES_UP_WITHIN, || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            port = listening(&text);
            port.is_some() || registry.child.try_wait().is_ok_and(|ended| ended.is_some())
        });
        let port = port.with_context(|| {
            let text = fs::read_to_string(&log).unwrap_or_default();
            format!("docker-registry does not come up: {text}")
        })?;
        registry.address = format!("{HOST}:{port}");
        Ok(registry)
    }

    /// Host and port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The authority of its certificate.
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Stores an image with skopeo; `source` as skopeo writes it, `words` go before it.
    ///
    /// # Errors
    /// skopeo fails.
    pub fn store(&self, source: &str, image: &str, words: &[&str]) -> Result<()> {
        let target = format!("docker://{}/{image}", self.address);
        let mut copy = cmd::command("skopeo", ["copy", "--quiet", "--dest-tls-verify=false"]);
        cmd::output(copy.args(words).args([source, &target])).map(drop)
    }

    /// Removes what it stores, behind its back: a blob that is there, and then is not.
    ///
    /// # Errors
    /// There is no such blob.
    pub fn lose(&self, digest: &str) -> Result<()> {
        let hex = digest.trim_start_matches("sha256:");
        let (start, _) = hex.split_at_checked(2).context("no digest")?;
        let blobs = "data/docker/registry/v2/blobs/sha256";
        let path = self.dir.path().join(blobs).join(start).join(hex);
        fs::remove_dir_all(&path).with_context(|| format!("no blob at {}", path.display()))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The port in the log's line.
fn listening(log: &str) -> Option<u16> {
    let (_, rest) = log.split_once(&format!("listening on {HOST}:"))?;
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    rest[..end].parse().ok()
}

fn configuration(setup: &Setup<'_>, dir: &Path) -> Result<String> {
    let show = |path: PathBuf| format!("{:?}", path.display().to_string());
    let mut text = format!(
        "version: 0.1
log: {{ level: info }}
storage:
  filesystem: {{ rootdirectory: {} }}
http:
  addr: {HOST}:0
",
        show(dir.join("data"))
    );
    if setup.tls {
        certificates(dir)?;
        text.push_str(&format!(
            "  tls: {{ certificate: {}, key: {} }}\n",
            show(dir.join("cert.pem")),
            show(dir.join("key.pem"))
        ));
    }
    if let Some((user, password)) = setup.password {
        let mut make = cmd::command("htpasswd", ["-Bbn", user, password]);
        let line = cmd::output(&mut make)
            .context("htpasswd is of apache2-utils: `cargo xtask setup --tests` installs it")?;
        fs::write(dir.join("htpasswd"), line)?;
        text.push_str(&format!(
            "auth:\n  htpasswd: {{ realm: lab, path: {} }}\n",
            show(dir.join("htpasswd"))
        ));
    }
    if let Some(server) = setup.token {
        fs::write(dir.join("token.pem"), server.certificate())?;
        text.push_str(&format!(
            "auth:\n  token: {{ realm: {:?}, service: {}, issuer: {}, rootcertbundle: {} }}\n",
            server.realm(),
            token::SERVICE,
            token::ISSUER,
            show(dir.join("token.pem"))
        ));
    }
    Ok(text)
}

fn certificates(dir: &Path) -> Result<()> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::<String>::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let ca = authority.self_signed(&authority_key)?.pem();
    let issuer = Issuer::from_params(&authority, &authority_key);
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec![HOST.to_owned()])?.signed_by(&key, &issuer)?;
    fs::write(dir.join("ca.pem"), ca)?;
    fs::write(dir.join("cert.pem"), certificate.pem())?;
    fs::write(dir.join("key.pem"), key.serialize_pem())?;
    Ok(())
}

/// A credentials file that skopeo writes.
///
/// # Errors
/// The registry does not take them.
pub fn log_in(registry: &Registry, user: &str, password: &str, file: &Path) -> Result<()> {
    let mut login = cmd::command("skopeo", ["login", "--tls-verify=false", "--authfile"]);
    login.arg(file);
    login.args([
        "--username",
        user,
        "--password",
        password,
        registry.address(),
    ]);
    cmd::output(&mut login).map(drop)
}

/// An OCI layout `layout:latest` made by umoci, whose one layer does not compress: `megabytes` of it.
///
/// # Errors
/// umoci fails.
pub fn umoci_image(folder: &Path, megabytes: usize) -> Result<PathBuf> {
    let (layout, bundle) = (folder.join("layout"), folder.join("bundle"));
    let image = format!("{}:latest", layout.display());
    let umoci = |words: &[&str], path: Option<&Path>| {
        let mut command = cmd::command("umoci", words);
        cmd::output(command.args(path)).map(drop)
    };
    umoci(&["init", "--layout"], Some(&layout))?;
    umoci(&["new", "--image", &image], None)?;
    umoci(&["unpack", "--image", &image], Some(&bundle))?;
    fill(&bundle.join("rootfs"), megabytes)?;
    umoci(&["repack", "--image", &image], Some(&bundle))?;
    umoci(
        &["config", "--image", &image, "--config.cmd", "/bin/tool"],
        None,
    )?;
    Ok(layout)
}

/// What the images of these tests have in them.
///
/// # Errors
/// The disk.
pub fn fill(root: &Path, megabytes: usize) -> Result<()> {
    use std::io::Read as _;
    fs::create_dir_all(root.join("bin"))?;
    fs::write(root.join("bin/tool"), b"#!/bin/sh\n")?;
    std::os::unix::fs::symlink("tool", root.join("bin/twin"))?;
    let mut noise = vec![0; megabytes << 20];
    File::open("/dev/urandom")?.read_exact(&mut noise)?;
    fs::write(root.join("noise"), noise)?;
    ensure!(root.join("noise").exists());
    Ok(())
}
