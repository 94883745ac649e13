//! What a guest prints on its console: a file in the pod's folder that the VMM appends to.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use vm_runtime::vm::CONSOLE;

/// A console that is larger than this, in bytes, is cut to its last half.
const LIMIT: u64 = 1 << 20;

/// How often a pod's console is looked at. Between two looks a guest can print as much as its serial line carries.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How much of the console's end goes into an error, in bytes.
const TAIL: u64 = 600;

/// Cuts a console that has grown beyond its limit to its last part; none is as good as a small one. Blocks.
///
/// The VMM goes on writing meanwhile. It has the file open with `O_APPEND`, so it carries on at the new end; what it
/// writes between the last read here and the cut, a few microseconds, is lost.
///
/// # Errors
/// The file cannot be read or written, or is none.
pub(super) fn bound(dir: &Path) -> io::Result<()> {
    bound_to(&dir.join(CONSOLE), LIMIT)
}

fn bound_to(path: &Path, limit: u64) -> io::Result<()> {
    // The VMM may write in this folder: a link there must not lead to somebody else's file.
    let opened = OpenOptions::new()
        .read(true)
        .append(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    if length <= limit {
        return Ok(());
    }
    // Room for what comes while it is read.
    let kept = read_from(&mut file, length - limit / 2, limit)?;
    file.set_len(0)?;
    file.write_all(&kept)
}

/// The last lines of a guest's console, on one line. The guest wrote them: control characters are escaped.
pub(super) fn last_lines(dir: &Path) -> String {
    let bytes = tail(&dir.join(CONSOLE)).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(|line| line.escape_debug().to_string())
        .collect();
    let first = lines.len().saturating_sub(5);
    lines.get(first..).unwrap_or_default().join(" | ")
}

fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    read_from(&mut file, length.saturating_sub(TAIL), TAIL)
}

fn read_from(file: &mut File, start: u64, most: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The file as the VMM has it open.
    fn writer(path: &Path) -> File {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap()
    }

    #[test]
    fn a_large_console_keeps_its_last_part_and_what_is_printed_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONSOLE);
        let mut vmm = writer(&path);
        let text: Vec<u8> = (0..LIMIT + 1).map(|n| (n % 251) as u8).collect();
        vmm.write_all(&text).unwrap();
        bound(dir.path()).unwrap();
        vmm.write_all(b"more").unwrap();
        let expected = [&text[text.len() - (LIMIT / 2) as usize..], b"more"].concat();
        assert!(fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn a_console_never_stays_beyond_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CONSOLE);
        let mut vmm = writer(&path);
        for n in 0..100 {
            writeln!(vmm, "line {n}").unwrap();
            bound_to(&path, 64).unwrap();
            let now = fs::read_to_string(&path).unwrap();
            assert!(now.len() <= 64, "{now}");
            assert!(now.ends_with(&format!("line {n}\n")), "{now}");
        }
    }

    #[test]
    fn a_console_within_its_limit_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        bound(dir.path()).unwrap();
        let path = dir.path().join(CONSOLE);
        writer(&path).write_all(&vec![7; LIMIT as usize]).unwrap();
        bound(dir.path()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), LIMIT);
    }

    #[test]
    fn a_link_in_the_consoles_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        fs::write(&other, vec![7; LIMIT as usize + 1]).unwrap();
        std::os::unix::fs::symlink(&other, dir.path().join(CONSOLE)).unwrap();
        bound(dir.path()).unwrap_err();
        assert_eq!(fs::metadata(&other).unwrap().len(), LIMIT + 1);
    }

    #[test]
    fn a_console_tail_has_the_last_lines_and_no_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..100).map(|n| format!("line {n}\r\n\r\n")).collect();
        fs::write(dir.path().join(CONSOLE), text + "\x1b[31mpanic").unwrap();
        let tail = last_lines(dir.path());
        assert!(tail.ends_with("line 99 | \\u{1b}[31mpanic"), "{tail}");
        assert_eq!(tail.matches('|').count(), 4);
        assert_eq!(last_lines(Path::new("/nonexistent")), "");
    }
}
