//! What an onlooker sees of TLS: the records, and the two hellos, which are in the clear.

use crate::wire::flow::Flow;

const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const ALPN: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;
const KEY_SHARE: u16 = 51;

/// The version number of TLS 1.3.
pub const TLS13: u16 = 0x0304;
/// The hybrid group's number.
pub const X25519_MLKEM768: u16 = 0x11ec;

/// A stream that is TLS from its first byte on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The hello, where this direction's first handshake message is one.
    pub hello: Option<Hello>,
    /// Bytes in records of application data (in TLS 1.3 also the encrypted handshake).
    pub encrypted: usize,
    /// The stream is nothing but whole records.
    pub whole: bool,
}

/// What a hello tells everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// True for the client's.
    pub client: bool,
    /// The version chosen (server), or the best one offered (client).
    pub version: u16,
    /// The key exchange group chosen (server), or the first one offered (client).
    pub group: Option<u16>,
    /// The protocols offered (client; the server's answer is encrypted in TLS 1.3).
    pub alpn: Vec<String>,
}

/// Reads the stream as TLS; `None` where its first bytes are no record, or there are none.
pub fn read(flow: &Flow) -> Option<Tls> {
    let (mut rest, mut handshake, mut encrypted) = (flow.data.as_slice(), Vec::new(), 0);
    let mut records = 0;
    while let Some((kind, body, after)) = record(rest) {
        match kind {
            HANDSHAKE => handshake.extend_from_slice(body),
            APPLICATION_DATA => encrypted += body.len(),
            _ => {}
        }
        rest = after;
        records += 1;
    }
    (records > 0).then(|| Tls { hello: hello(&handshake), encrypted, whole: rest.is_empty() && flow.missing == 0 })
}

/// Kind and body of the first record, and what follows it.
fn record(data: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[kind, 3, 0..=4, high, low], rest) = data.split_first_chunk()? else { return None };
    let size = usize::from(u16::from_be_bytes([high, low]));
    let known = (20..=23).contains(&kind) && size <= (1 << 14) + 256;
    let (body, after) = rest.split_at_checked(size)?;
    known.then_some((kind, body, after))
}

/// Hellos of RFC 8446, section 4.1.
fn hello(handshake: &[u8]) -> Option<Hello> {
    let mut reader = Reader(handshake);
    let kind = reader.u8()?;
    let mut body = Reader(reader.vector(3)?);
    let client = match kind {
        CLIENT_HELLO => true,
        SERVER_HELLO => false,
        _ => return None,
    };
    let mut hello = Hello { client, version: body.u16()?, ..Hello::default() };
    body.take(32)?;
    body.vector(1)?;
    if client {
        body.vector(2)?;
        body.vector(1)?;
    } else {
        body.take(3)?;
    }
    let mut extensions = Reader(body.vector(2)?);
    while let Some(number) = extensions.u16() {
        let mut extension = Reader(extensions.vector(2)?);
        match number {
            SUPPORTED_VERSIONS if client => hello.version = Reader(extension.vector(1)?).all_u16().into_iter().max()?,
            SUPPORTED_VERSIONS => hello.version = extension.u16()?,
            KEY_SHARE if client => hello.group = Reader(extension.vector(2)?).u16(),
            KEY_SHARE => hello.group = extension.u16(),
            ALPN => {
                let mut names = Reader(extension.vector(2)?);
                while let Some(name) = names.vector(1) {
                    hello.alpn.push(String::from_utf8_lossy(name).into_owned());
                }
            }
            _ => {}
        }
    }
    Some(hello)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, size: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(size)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// A field that begins with its size, in so many bytes.
    fn vector(&mut self, width: usize) -> Option<&'a [u8]> {
        let size = self.take(width)?.iter().fold(0, |size, byte| size << 8 | usize::from(*byte));
        self.take(size)
    }

    fn all_u16(&mut self) -> Vec<u16> {
        // GREASE (RFC 8701) puts values such as 0x7a7a among the versions.
        std::iter::from_fn(|| self.u16()).filter(|version| version >> 8 == 3).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::flow::{Packet, Segment, flows};

    fn prefixed(width: usize, body: &[u8]) -> Vec<u8> {
        let size = body.len().to_be_bytes();
        [&size[size.len() - width..], body].concat()
    }

    fn server_hello() -> Vec<u8> {
        let versions = [&[0, 43][..], &prefixed(2, &[3, 4])].concat();
        let share = [&[0, 51][..], &prefixed(2, &[0x11, 0xec, 0, 1, 9])].concat();
        let extensions = prefixed(2, &[versions, share].concat());
        let body = [&[3, 3][..], &[7; 32], &prefixed(1, &[1, 2]), &[0x13, 1, 0], &extensions].concat();
        let message = [&[2][..], &prefixed(3, &body)].concat();
        [&[22, 3, 3][..], &prefixed(2, &message)].concat()
    }

    fn flow(data: &[u8]) -> Flow {
        let (src, dst) = ("10.0.0.1:1000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let tcp = Some(Segment { seq: 0, syn: true, fin: false, rst: false });
        flows(&[Packet { src, dst, payload: data.to_vec(), tcp }]).pop().unwrap()
    }

    #[test]
    fn reads_what_a_server_chose() {
        let data = [server_hello(), vec![23, 3, 3, 0, 4, 1, 2, 3, 4]].concat();
        let tls = read(&flow(&data)).unwrap();
        let hello = tls.hello.unwrap();
        assert_eq!((hello.client, hello.version, hello.group), (false, TLS13, Some(X25519_MLKEM768)));
        assert_eq!((tls.encrypted, tls.whole), (4, true));
    }

    #[test]
    fn plaintext_is_no_tls_and_a_tail_is_noticed() {
        assert_eq!(read(&flow(b"GET / HTTP/1.1\r\n\r\n")), None);
        assert_eq!(read(&flow(b"")), None);
        let tail = [server_hello(), b"hello".to_vec()].concat();
        assert!(!read(&flow(&tail)).unwrap().whole);
    }
}
