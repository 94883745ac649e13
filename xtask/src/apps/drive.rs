//! The course of a run: the pod, its load, the moves, and what is compared at the end.

use std::cell::Cell;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::load::Load;
use super::place::{ADDRESS, POD, Place};
use super::{App, image, memcached, nginx, postgres, redis};
use crate::cmd;
use crate::lab::{Lab, Node};
use crate::migrate::migrate_with;
use crate::process::poll_until;
use crate::project::Project;
use crate::report::Outcome;

/// What load may take to come through after a move.
const GOES_ON_WITHIN: Duration = Duration::from_secs(60);

/// What the checks of a file system, or of PostgreSQL's pages, may take.
const CHECKS_WITHIN: Duration = Duration::from_secs(180);

/// Runs servers in one pod, moves it, and compares. The lab is up, and node a has the image. Each line of its course goes to `tell`.
///
/// # Errors
/// A client saw an error, a server does not have what it said to have, or the pod does not come up or move.
pub fn run(
    project: &Project,
    lab: &Lab,
    apps: &[App],
    moves: u32,
    options: &[String],
    tell: &mut dyn FnMut(&str),
) -> Result<()> {
    let names: Vec<&str> = apps.iter().map(|app| app.name()).collect();
    let names = names.join(", ");
    let namespace = lab.client();
    let place = Place {
        lab,
        namespace: &namespace,
        address: ADDRESS,
        at: Cell::new(Node::A),
    };
    let has_volume = apps.contains(&App::Postgres);
    if has_volume {
        let mut create = lab.on(Node::A);
        cmd::output(create.args(["volume", "create", postgres::VOLUME, "--size", "512Mi"]))?;
    }
    start(&place, &pod(apps, false))?;
    let mut loads: Vec<(App, Box<dyn Load + '_>)> = Vec::new();
    for app in apps {
        let took = place.comes_up(app.name(), app.port())?;
        tell(&format!(
            "{}: up after {:.1} s",
            app.name(),
            took.as_secs_f64()
        ));
    }
    for app in apps {
        let load: Box<dyn Load + '_> = match app {
            App::Postgres => Box::new(postgres::Postgres::start(
                &place,
                &image::pgbench(project)?,
            )?),
            App::Redis => Box::new(redis::Server::start(&place)?),
            App::Nginx => Box::new(nginx::Server::start(&place)?),
            App::Memcached => Box::new(memcached::Server::start(&place)?),
        };
        loads.push((*app, load));
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    for number in 1..=moves {
        goes_on(&loads)?;
        let from = place.at.get();
        let (began, mut course) = (Instant::now(), Vec::new());
        let report = migrate_with(lab, POD, from, &options, &mut |line| {
            course.push(line.to_owned())
        })?;
        ensure!(
            report.outcome == Outcome::Completed,
            "move {number} of {names}: {report:?}\n{}",
            course.join("\n")
        );
        ensure!(
            report.packets.lost == 0 && report.packets.held == 0,
            "move {number} of {names}: {report:?}"
        );
        place.at.set(from.other());
        tell(&format!(
            "{names}: move {number}: downtime {:.1} ms, {:.1} s in all",
            report.downtime_ms,
            began.elapsed().as_secs_f64()
        ));
    }
    goes_on(&loads)?;
    for (app, load) in loads {
        let done = load
            .end()
            .with_context(|| format!("{} after {moves} moves", app.name()))?;
        tell(&format!("{}: {done}; no error", app.name()));
    }
    stop(&place)?;
    if has_volume {
        whole_volume(&place, tell)?;
    }
    Ok(())
}

/// Waits until each server has answered some more since now.
fn goes_on(loads: &[(App, Box<dyn Load + '_>)]) -> Result<()> {
    let floors: Vec<u64> = loads.iter().map(|(_, load)| load.done()).collect();
    for ((app, load), floor) in loads.iter().zip(floors) {
        let mut fault = None;
        let more = poll_until(GOES_ON_WITHIN, || {
            fault = load.fault();
            // Two: what is counted by the second may belong to the one before.
            fault.is_some() || load.done() >= floor + 2
        });
        if let Some(fault) = fault {
            bail!("the client of {}: {fault}", app.name());
        }
        ensure!(more, "{} does not answer any more", app.name());
    }
    Ok(())
}

/// After the pod's end: its file system has no fault, and every page of PostgreSQL the checksum that it was written with.
fn whole_volume(place: &Place<'_>, tell: &mut dyn FnMut(&str)) -> Result<()> {
    let file = volume_file(place);
    let mut fsck = Command::new("/usr/sbin/e2fsck");
    let said = cmd::bounded(fsck.arg("-fn").arg(&file), CHECKS_WITHIN)?;
    ensure!(said.code == Some(0), "{}: {said:?}", file.display());
    start(place, &pod(&[App::Postgres], true))?;
    let mut log = String::new();
    let ended = poll_until(CHECKS_WITHIN, || {
        log = place.logs(postgres::CONTAINER).unwrap_or_default();
        log.contains("all are right") || log.contains("error")
    });
    ensure!(
        ended && log.contains("all are right"),
        "pg_checksums says: {log}"
    );
    let blocks = log.lines().find(|l| l.starts_with("Blocks scanned"));
    tell(&format!(
        "postgres: the volume is clean; pg_checksums: {}",
        blocks.unwrap_or("?")
    ));
    stop(place)?;
    let mut remove = place.lab.on(place.at.get());
    cmd::output(remove.args(["volume", "rm", postgres::VOLUME])).map(drop)
}

fn volume_file(place: &Place<'_>) -> PathBuf {
    let node = place.lab.node_dir(place.at.get());
    node.join(format!("state/volumes/{}.img", postgres::VOLUME))
}

fn start(place: &Place<'_>, yaml: &str) -> Result<()> {
    let file = place.lab.dir().join("apps-pod.yaml");
    std::fs::write(&file, yaml).with_context(|| format!("cannot write {}", file.display()))?;
    cmd::output(place.lab.on(place.at.get()).arg("run").arg(&file)).map(drop)
}

fn stop(place: &Place<'_>) -> Result<()> {
    cmd::output(place.lab.on(place.at.get()).args(["stop", POD])).map(drop)
}

/// The pod with these servers, or with what checks PostgreSQL's files.
fn pod(apps: &[App], check: bool) -> String {
    let memory = 256 + 96 * apps.len();
    let volumes = match apps.contains(&App::Postgres) {
        true => format!("  volumes:\n{}", postgres::volume()),
        false => String::new(),
    };
    let containers: String = apps
        .iter()
        .map(|app| match app {
            App::Postgres if check => postgres::checker(image::REFERENCE),
            App::Postgres => postgres::container(image::REFERENCE),
            App::Redis => redis::container(image::REFERENCE),
            App::Nginx => nginx::container(image::REFERENCE),
            App::Memcached => memcached::container(image::REFERENCE),
        })
        .collect();
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations: {{ migrator/ipv4: {ADDRESS}/24, migrator/vm-memory: {memory}Mi }}
spec:
  restartPolicy: Never
{volumes}  containers:
{containers}"
    )
}
