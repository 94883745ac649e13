//! Compressed streams, told by their first bytes: media types are not always right.

use std::io::{self, BufRead, BufReader, Read};

/// Buffer in front of a decoder, in bytes.
const BUFFER: usize = 256 << 10;

/// What a stream is compressed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Tells the compression by the magic number (RFC 1952, RFC 8878).
fn sniff(start: &[u8]) -> io::Result<Compression> {
    let known: [(&[u8], Result<Compression, &str>); 5] = [
        (&[0x1f, 0x8b], Ok(Compression::Gzip)),
        (&[0x28, 0xb5, 0x2f, 0xfd], Ok(Compression::Zstd)),
        (b"BZh", Err("bzip2")),
        (&[0xfd, b'7', b'z', b'X', b'Z'], Err("xz")),
        (&[0x5d, 0, 0], Err("lzma")),
    ];
    for (magic, compression) in known {
        if start.starts_with(magic) {
            return compression.map_err(|name| {
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("compressed with {name}: only gzip and zstd are read"),
                )
            });
        }
    }
    Ok(Compression::None)
}

/// A reader of the uncompressed stream, and what it was compressed with. Reading more than `limit` bytes
/// from it is an error, however small the compressed stream is.
pub(super) fn decompress<'a>(
    inner: impl Read + 'a,
    limit: u64,
) -> io::Result<(Compression, Bounded<Box<dyn Read + 'a>>)> {
    let mut buffered = BufReader::with_capacity(BUFFER, inner);
    let compression = sniff(buffered.fill_buf()?)?;
    let reader: Box<dyn Read + 'a> = match compression {
        Compression::None => Box::new(buffered),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(buffered)?),
    };
    Ok((
        compression,
        Bounded {
            inner: reader,
            left: limit,
            limit,
        },
    ))
}

/// A reader that gives an error, not an end, when more than its limit is read.
pub(super) struct Bounded<R> {
    inner: R,
    left: u64,
    limit: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it unpacks to more than the limit of {} bytes", self.limit),
            )
        })?;
        Ok(n)
    }
}
