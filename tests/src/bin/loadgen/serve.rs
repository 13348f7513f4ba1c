//! `loadgen serve`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

use crate::{CHUNK, SINK};

/// Connections that are served at a time. The threads wait in accept(2): a new connection costs none.
const THREADS: usize = 128;
const BACKLOG: i32 = 4096;

pub fn run(listen: SocketAddr) -> Result<()> {
    let socket = Socket::new(Domain::for_address(listen), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&listen.into()).with_context(|| format!("cannot listen on {listen}"))?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from(socket);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| accept(&listener));
        }
    });
    Ok(())
}

fn accept(listener: &TcpListener) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let served = listener.accept().map_err(Into::into).and_then(|(stream, _)| serve(stream, &mut buffer));
        if let Err(error) = served {
            eprintln!("{error:#}");
        }
    }
}

/// Echoes; or counts what comes, and at its end sends the count, by which the client knows that all of it has arrived.
fn serve(mut stream: TcpStream, buffer: &mut [u8]) -> Result<()> {
    stream.set_nodelay(true)?;
    let (mut received, mut sink) = (0_u64, false);
    loop {
        let read = stream.read(buffer)?;
        if read == 0 {
            break;
        }
        sink |= received == 0 && buffer[0] == SINK;
        received += read as u64;
        if !sink {
            stream.write_all(&buffer[..read])?;
        }
    }
    if sink {
        stream.write_all(&received.to_be_bytes())?;
    }
    Ok(())
}
