//! One check of a container by a process of its own: its exit code is the result.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use guest_agent::protocol::message::Failure;
use guest_agent::protocol::settings::Check;
use nix::unistd::Pid;

use crate::boot::CGROUPS;
use crate::containers::{Entrance, failed};
use crate::launch::{Launch, Place, Program, Stdio};
use crate::sys;

/// The longest status line that is read, in bytes.
const LONGEST_LINE: u64 = 1024;

/// Begins a check. Its process ends with 0 if all is well.
pub(crate) fn begin(check: &Check, at: &Entrance<'_>, limit: Duration) -> Result<Pid, Failure> {
    match check {
        Check::Exec(argv) => command(argv, at),
        Check::Tcp { host, port } => {
            let server = address(*host, *port);
            helper(move || TcpStream::connect_timeout(&server, limit).is_ok())
        }
        Check::Http {
            host,
            port,
            path,
            headers,
        } => {
            let server = address(*host, *port);
            helper(move || get(server, path, headers, limit).is_ok())
        }
    }
}

/// Runs a command in a container, with nothing to read and nobody to read it.
pub(crate) fn command(argv: &[String], at: &Entrance<'_>) -> Result<Pid, Failure> {
    let null = || -> Result<OwnedFd, Failure> {
        let file = File::options().read(true).write(true).open("/dev/null");
        Ok(file.map_err(failed)?.into())
    };
    let (pid, _) = Launch {
        place: Place::Join(at.namespaces),
        cgroup: at.cgroup,
        program: Program {
            argv: argv.to_vec(),
            env: at.env.to_vec(),
            working_dir: at.spec.working_dir.clone(),
            user: at.spec.user.clone(),
            rights: at.rights.clone(),
        },
        stdio: Stdio::Pipes([null()?, null()?, null()?]),
    }
    .run()?;
    Ok(pid)
}

/// Runs `work` in a copy of the agent, beside it; its process ends with 0 for `true`.
pub(crate) fn helper(work: impl FnOnce() -> bool) -> Result<Pid, Failure> {
    let cgroup = File::open(CGROUPS).map_err(failed)?;
    match sys::fork_into(0, cgroup.as_fd()).map_err(failed)? {
        Some((pid, _)) => Ok(pid),
        None => {
            sys::default_signals();
            sys::exit_now(i32::from(!work()))
        }
    }
}

fn address(host: Option<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(host.unwrap_or(Ipv4Addr::LOCALHOST.into()), port)
}

fn get(
    server: SocketAddr,
    path: &str,
    headers: &[(String, String)],
    limit: Duration,
) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&server, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut request = format!("GET {path} HTTP/1.1\r\nConnection: close\r\n");
    let named = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if !named("host") {
        request += &format!("Host: {server}\r\n");
    }
    if !named("user-agent") {
        request += "User-Agent: migrator-probe\r\n";
    }
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    stream.write_all((request + "\r\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut piece = [0; 256];
    while !answer.contains(&b'\n') {
        let read = stream.read(&mut piece)?;
        ensure!(read > 0, "the connection was closed");
        answer.extend(&piece[..read]);
        ensure!(answer.len() as u64 <= LONGEST_LINE, "no line");
    }
    match status(&String::from_utf8_lossy(&answer)) {
        Some(200..400) => Ok(()),
        Some(status) => bail!("status {status}"),
        None => None.context("no status"),
    }
}

/// The status of an answer's first line (RFC 9112, section 4).
fn status(answer: &str) -> Option<u16> {
    let rest = answer.strip_prefix("HTTP/1.")?;
    rest.split(' ').nth(1)?.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufRead;
    use std::net::TcpListener;

    #[test]
    fn a_status_is_read_and_anything_else_is_none() {
        assert_eq!(status("HTTP/1.1 204 No Content\r\n"), Some(204));
        assert_eq!(status("HTTP/1.0 503\r\n"), Some(503));
        for odd in ["", "HTTP/2 200", "SSH-2.0-x", "HTTP/1.1 x"] {
            assert_eq!(status(odd), None, "{odd}");
        }
    }

    #[test]
    fn only_an_answer_from_200_to_399_is_a_success() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let answers = [
            "HTTP/1.1 200 OK",
            "HTTP/1.1 302 Found",
            "HTTP/1.1 404 No",
            "nothing",
        ];
        let served = std::thread::spawn(move || {
            let serve = |answer: &str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                std::io::BufReader::new(stream.try_clone().unwrap())
                    .read_line(&mut line)
                    .unwrap();
                write!(stream, "{answer}\r\n\r\n").unwrap();
                line
            };
            answers.map(serve)
        });
        let headers = [("X-A".to_owned(), "b".to_owned())];
        let limit = Duration::from_secs(10);
        let good = [true, true, false, false];
        for good in good {
            assert_eq!(get(server, "/healthz", &headers, limit).is_ok(), good);
        }
        let lines = served.join().unwrap();
        assert!(
            lines.iter().all(|l| l == "GET /healthz HTTP/1.1\r\n"),
            "{lines:?}"
        );
    }
}
