use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::proxy::testing::pair;

const SHORT: Duration = Duration::from_millis(30);
const LONG: Duration = Duration::from_secs(20);

/// The beginning of a ClientHello whose record has 0x0601 bytes, as a hybrid key share makes it.
const HELLO: [u8; 11] = [22, 3, 1, 0x06, 0x01, 1, 0, 0x05, 0xfd, 3, 3];

async fn replayed(mut stream: Replay, end: TcpStream) -> Vec<u8> {
    drop(end);
    let mut all = Vec::new();
    timeout(LONG, stream.read_to_end(&mut all)).await.unwrap().unwrap();
    all
}

#[test]
fn tells_a_client_hello_from_everything_else() {
    for length in 0..=HELLO.len() {
        let expected = (length >= 6).then_some(true);
        assert_eq!(is_client_hello(&HELLO[..length]), expected, "{length}");
    }
    let others: [&[u8]; 9] = [
        b"GET / HTTP/1.1",
        b"\x00",
        b"\x16SSH",
        // Another major version, a version of the future, a record too long, an alert, a ServerHello.
        &[22, 2],
        &[22, 3, 5],
        &[22, 3, 1, 0x41],
        &[21, 3, 3, 0, 2, 2, 40],
        &[22, 3, 3, 0, 80, 2],
        // SSL 2.
        &[0x80, 0x2e, 1, 3, 1],
    ];
    for bytes in others {
        assert_eq!(is_client_hello(bytes), Some(false), "{bytes:?}");
    }
}

#[tokio::test]
async fn a_client_hello_is_told_however_it_is_cut_and_loses_no_byte() {
    for size in [1, 2, 5, 6, 11] {
        let (mut far, near) = pair().await;
        let writer = async {
            for part in HELLO.chunks(size) {
                far.write_all(part).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (opening, ()) = tokio::join!(first(near, LONG, LONG), writer);
        let Opening::Tls(stream) = opening.unwrap() else { panic!("in parts of {size}: not TLS") };
        assert_eq!(replayed(stream, far).await, HELLO);
    }
}

#[tokio::test]
async fn plaintext_is_told_by_its_first_byte_and_loses_none() {
    let (mut far, near) = pair().await;
    far.write_all(b"G").await.unwrap();
    let Opening::Plaintext(stream) = first(near, LONG, LONG).await.unwrap() else { panic!("not plaintext") };
    far.write_all(b"ET /").await.unwrap();
    assert_eq!(replayed(stream, far).await, b"GET /");
}

#[tokio::test]
async fn an_early_end_is_plaintext() {
    for bytes in [&b""[..], &HELLO[..3]] {
        let (mut far, near) = pair().await;
        far.write_all(bytes).await.unwrap();
        far.shutdown().await.unwrap();
        let Opening::Plaintext(stream) = first(near, LONG, LONG).await.unwrap() else { panic!("not plaintext") };
        assert_eq!(replayed(stream, far).await, bytes);
    }
}

#[tokio::test]
async fn a_header_that_is_never_finished_is_plaintext() {
    let (mut far, near) = pair().await;
    far.write_all(&HELLO[..1]).await.unwrap();
    let Opening::Plaintext(stream) = first(near, LONG, SHORT).await.unwrap() else { panic!("not plaintext") };
    assert_eq!(replayed(stream, far).await, [22]);
}

#[tokio::test]
async fn a_silent_peer_may_still_begin_tls_until_the_application_speaks() {
    let (mut far, near) = pair().await;
    let (app, mut far_app) = pair().await;
    let Opening::Silent(near) = first(near, SHORT, LONG).await.unwrap() else { panic!("not silent") };
    far.write_all(&HELLO).await.unwrap();
    let Opening::Tls(stream) = late(near, &app, LONG).await.unwrap() else { panic!("not TLS") };
    assert_eq!(replayed(stream, far).await, HELLO);

    let (far, near) = pair().await;
    let Opening::Silent(near) = first(near, SHORT, LONG).await.unwrap() else { panic!("not silent") };
    far_app.write_all(b"220 ready").await.unwrap();
    let Opening::Plaintext(stream) = late(near, &app, LONG).await.unwrap() else { panic!("not plaintext") };
    assert_eq!(replayed(stream, far).await, b"");
    let mut greeting = [0; 9];
    let mut app = app;
    app.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 ready", "looking at it took nothing");
}
