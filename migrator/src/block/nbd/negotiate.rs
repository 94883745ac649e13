//! The handshake: from the first byte to a client that may send requests.

use std::io::{self, Read, Write};

use super::codec::{
    FIXED_NEWSTYLE, Facts, INIT_MAGIC, MAX_OPTION, NO_ZEROES, OPTION_LEN, OPTION_MAGIC, OptionKind,
    OptionReply, export_name, info_block_size, info_export, option, option_reply,
};

/// Most options of one client: it needs two or three.
const MAX_OPTIONS: usize = 64;

/// Leads a client through the handshake. False: it has ended by itself, properly.
///
/// # Errors
/// It broke the protocol (`InvalidData`), or the connection broke.
pub(super) fn negotiate(stream: &mut (impl Read + Write), facts: Facts) -> io::Result<bool> {
    let mut hello = INIT_MAGIC.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&hello)?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(broken("flags that are not known"));
    }
    let no_zeroes = flags & u32::from(NO_ZEROES) != 0;
    for _ in 0..MAX_OPTIONS {
        let mut header = [0; OPTION_LEN];
        stream.read_exact(&mut header)?;
        let (number, kind, len) = option(&header).ok_or_else(|| broken("no option"))?;
        let answer = |reply: OptionReply, data: &[u8]| option_reply(number, reply, data);
        if len > MAX_OPTION {
            if kind == OptionKind::ExportName {
                return Err(broken("a name that is too long"));
            }
            // Its data has to be read for the next option to be found.
            if io::copy(&mut stream.take(len.into()), &mut io::sink())? < len.into() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let reply = answer(OptionReply::TooBig, b"the option is too long");
            stream.write_all(&reply)?;
            continue;
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        let reply = match kind {
            OptionKind::ExportName => {
                if !data.is_empty() {
                    return Err(broken("the name of an export that is not here"));
                }
                let mut reply = facts.size.to_be_bytes().to_vec();
                reply.extend(facts.flags().to_be_bytes());
                if !no_zeroes {
                    reply.extend([0; 124]);
                }
                stream.write_all(&reply)?;
                return Ok(true);
            }
            OptionKind::Abort => {
                // It may be gone already.
                let _ = stream.write_all(&answer(OptionReply::Ack, &[]));
                return Ok(false);
            }
            OptionKind::List if data.is_empty() => {
                let mut reply = answer(OptionReply::Server, &0_u32.to_be_bytes());
                reply.extend(answer(OptionReply::Ack, &[]));
                reply
            }
            OptionKind::List => answer(OptionReply::Invalid, b"this option has no data"),
            OptionKind::Info | OptionKind::Go => match export_name(&data) {
                Some(b"") => {
                    let mut reply = answer(OptionReply::Info, &info_export(facts));
                    reply.extend(answer(OptionReply::Info, &info_block_size()));
                    reply.extend(answer(OptionReply::Ack, &[]));
                    stream.write_all(&reply)?;
                    if kind == OptionKind::Go {
                        return Ok(true);
                    }
                    continue;
                }
                Some(_) => answer(
                    OptionReply::UnknownExport,
                    b"a socket serves one disk, whose name is empty",
                ),
                None => answer(OptionReply::Invalid, b"the lengths do not add up"),
            },
            OptionKind::Other => answer(OptionReply::Unsupported, &[]),
        };
        stream.write_all(&reply)?;
    }
    Err(broken("too many options"))
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
