//! What headers in front of an archive's entry say of it (POSIX.1-2017, pax, "pax Interchange Format").

/// What extension headers said of the entry behind them.
#[derive(Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: bool,
}

impl Extensions {
    /// Reads the records of a PAX header: `LENGTH KEY=VALUE\n`, LENGTH in decimal and counting itself.
    pub(super) fn read(&mut self, mut records: &[u8]) -> Result<(), &'static str> {
        const BAD: &str = "bad PAX record";
        while !records.is_empty() {
            // Some writers pad with zeroes.
            if records.iter().all(|&byte| byte == 0) {
                return Ok(());
            }
            let space = records
                .iter()
                .take(10)
                .position(|&byte| byte == b' ')
                .ok_or(BAD)?;
            let length: usize = number(&records[..space]).ok_or(BAD)?;
            let record = records.get(space + 1..length).ok_or(BAD)?;
            let record = record.strip_suffix(b"\n").ok_or(BAD)?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or(BAD)?;
            self.set(&record[..equals], &record[equals + 1..])?;
            records = &records[length..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number(value).ok_or("bad PAX size")?),
            b"uid" => self.uid = Some(number(value).ok_or("bad PAX uid")?),
            b"gid" => self.gid = Some(number(value).ok_or("bad PAX gid")?),
            b"mtime" => self.mtime = Some(time(value).ok_or("bad PAX mtime")?),
            _ if key.starts_with(b"GNU.sparse.") => self.sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.retain(|(known, _)| known != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A PAX time: decimal seconds, perhaps negative, perhaps with a fraction.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = seconds.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    if text.starts_with('-') {
        return Some((0, 0));
    }
    let nanos = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    Some((
        seconds,
        nanos.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0')),
    ))
}
