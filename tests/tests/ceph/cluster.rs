//! A Ceph cluster of one node, from Debian's packages: a monitor, a manager and an OSD on a sparse file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::process::{ProcessId, poll_until};
use xtask::{cmd, netns};

/// The pool of the class.
pub(crate) const POOL: &str = "pods";
/// Its user.
pub(crate) const USER: &str = "migrator";
/// A healthy cluster answers in a tenth of a second.
const SOON: Duration = Duration::from_secs(30);
/// From the start to an active pool: 7 s on an idle machine.
const COMES_UP_WITHIN: Duration = Duration::from_secs(120);

/// A cluster that runs; dropping it ends its daemons, which are its own.
pub(crate) struct Cluster {
    dir: PathBuf,
    netns: String,
    address: String,
    daemons: Vec<ProcessId>,
}

impl Cluster {
    /// Starts one in a namespace that has the address.
    ///
    /// # Errors
    /// It does not come up.
    pub(crate) fn start(dir: &Path, netns: &str, address: &str) -> Result<Self> {
        for part in ["mon", "mgr", "osd", "log", "run"] {
            std::fs::create_dir_all(dir.join(part))?;
        }
        let mut cluster = Self {
            dir: dir.to_owned(),
            netns: netns.to_owned(),
            address: address.to_owned(),
            daemons: Vec::new(),
        };
        cluster.begin()?;
        Ok(cluster)
    }

    fn begin(&mut self) -> Result<()> {
        let fsid = uuid()?;
        std::fs::write(self.path("ceph.conf"), self.conf(&fsid))?;
        let keyring = self.path("keyring").display().to_string();
        let create = ["-C", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"];
        self.tool(
            "ceph-authtool",
            &[&[keyring.as_str()], &create[..]].concat(),
        )?;
        let daemons: [(&str, &[&str]); 3] = [
            (
                "client.admin",
                &["mon", "allow *", "osd", "allow *", "mgr", "allow *"],
            ),
            ("mgr.a", &["mon", "allow profile mgr", "osd", "allow *"]),
            (
                "osd.0",
                &[
                    "mon",
                    "allow profile osd",
                    "mgr",
                    "allow profile osd",
                    "osd",
                    "allow *",
                ],
            ),
        ];
        for (name, caps) in daemons {
            let mut args = vec![keyring.as_str(), "--gen-key", "-n", name];
            for cap in caps.chunks(2) {
                args.push("--cap");
                args.extend(cap);
            }
            self.tool("ceph-authtool", &args)?;
        }
        let map = self.path("monmap").display().to_string();
        let address = self.monitors();
        self.tool(
            "monmaptool",
            &[
                "--create",
                "--clobber",
                "--fsid",
                &fsid,
                "--addv",
                "a",
                &address,
                &map,
            ],
        )?;
        self.tool(
            "ceph-mon",
            &["--mkfs", "-i", "a", "--monmap", &map, "--keyring", &keyring],
        )?;
        self.daemon("ceph-mon", "a")?;
        self.comes("the monitor answers", |cluster| {
            cluster.admin(&["-s"]).is_ok()
        })?;
        self.daemon("ceph-mgr", "a")?;
        let osd = uuid()?;
        self.admin(&["osd", "new", &osd, "0"])?;
        self.tool("ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", &osd])?;
        self.daemon("ceph-osd", "0")?;
        self.comes("the OSD is up", |cluster| {
            let stat = cluster.admin(&["osd", "stat"]).unwrap_or_default();
            stat.contains("1 up") && stat.contains("1 in")
        })?;
        self.admin(&["osd", "pool", "create", POOL, "8", "8"])?;
        self.comes("the pool is active", |cluster| {
            let stat = cluster.admin(&["pg", "stat"]).unwrap_or_default();
            stat.contains("active+clean;") && !stat.starts_with("0 pgs")
        })?;
        self.tool("rbd", &["pool", "init", POOL])?;
        let profile = format!("profile rbd pool={POOL}");
        let user = format!("client.{USER}");
        self.admin(&[
            "auth",
            "get-or-create",
            &user,
            "mon",
            "profile rbd",
            "osd",
            &profile,
            "mgr",
            &profile,
        ])?;
        let key = self.admin(&["auth", "get-key", &user])?;
        std::fs::write(self.key_file(), key)?;
        cmd::run(Command::new("chmod").arg("600").arg(self.key_file()))
    }

    /// The configuration of the class that is in it.
    pub(crate) fn class(&self) -> String {
        format!(
            "{{ driver: rbd, pool: {POOL}, monitors: [\"{}:3300\"], user: {USER}, key_file: {} }}",
            self.address,
            self.key_file().display()
        )
    }

    /// `ceph`, as its administrator.
    pub(crate) fn admin(&self, args: &[&str]) -> Result<String> {
        self.tool("ceph", &[&["--connect-timeout", "5"], args].concat())
    }

    /// Another program, as its administrator.
    pub(crate) fn tool(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.arg("--conf").arg(self.path("ceph.conf")).args(args);
        if program == "ceph-authtool" || program == "monmaptool" {
            // Neither reads a configuration.
            command = Command::new(program);
            command.args(args);
        }
        netns::within(&self.netns, || {
            let said = cmd::bounded(&mut command, SOON)?;
            ensure!(said.code == Some(0), "{program} {args:?}: {said:?}");
            Ok(said.out)
        })
    }

    /// Ends its daemons.
    pub(crate) fn end(mut self) -> Result<()> {
        self.end_daemons()
    }

    fn end_daemons(&mut self) -> Result<()> {
        while let Some(daemon) = self.daemons.pop() {
            daemon.end(Duration::from_secs(20))?;
        }
        Ok(())
    }

    fn daemon(&mut self, program: &str, id: &str) -> Result<()> {
        let log = std::fs::File::create(self.path("log").join(format!("{program}.out")))?;
        let mut command = Command::new("setsid");
        command
            .args([program, "-f", "-i", id, "--conf"])
            .arg(self.path("ceph.conf"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = netns::spawn(&self.netns, &mut command)?;
        // setsid(1) makes the session in the process that it is, and becomes the program.
        self.daemons
            .push(ProcessId::of(program, child.id().cast_signed())?);
        Ok(())
    }

    fn comes(&self, what: &str, so: impl Fn(&Self) -> bool) -> Result<()> {
        ensure!(
            poll_until(COMES_UP_WITHIN, || so(self)),
            "never: {what}; the daemons said last:\n{}",
            self.last_lines()
        );
        Ok(())
    }

    /// The end of each log: the folder is gone with the lab.
    fn last_lines(&self) -> String {
        let files = std::fs::read_dir(self.path("log")).into_iter().flatten();
        let ends = files.flatten().map(|file| {
            let text = std::fs::read(file.path()).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().rev().take(20).collect();
            let lines: Vec<&str> = lines.into_iter().rev().collect();
            format!("{}:\n{}", file.path().display(), lines.join("\n"))
        });
        ends.collect::<Vec<_>>().join("\n")
    }

    fn monitors(&self) -> String {
        let address = &self.address;
        format!("[v2:{address}:3300/0,v1:{address}:6789/0]")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn key_file(&self) -> PathBuf {
        self.path("key")
    }

    fn conf(&self, fsid: &str) -> String {
        let (dir, address, monitors) = (self.dir.display(), &self.address, self.monitors());
        format!(
            "[global]
fsid = {fsid}
mon host = {monitors}
mon initial members = a
public addr = {address}
cluster addr = {address}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {dir}/keyring
run dir = {dir}/run
crash dir = {dir}/run
admin socket = {dir}/run/$name.$pid.asok
pid file = {dir}/run/$name.pid
log file = {dir}/log/$name.log
mon cluster log file = {dir}/log/cluster.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.1
mon tick interval = 1
mgr tick period = 1
mgr stats period = 1
mon data = {dir}/mon
mgr data = {dir}/mgr
mgr initial modules =
osd data = {dir}/osd
osd objectstore = bluestore
osd memory target = 939524096
bluestore block size = 4294967296
bluestore cache autotune = false
bluestore cache size = 67108864
"
        )
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.end_daemons() {
            eprintln!("{error:#}");
        }
    }
}

fn uuid() -> Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    Ok(text.context("no UUID")?.trim().to_owned())
}
