//! `testpod tls` and `tls-serve`: TLS peers that are not Sealane, with whatever certificate they are given.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, ServerConfig, ServerConnection,
    SignatureScheme, StreamOwned, SupportedProtocolVersion, version,
};
use sealane_tests::report::{End, Event, TlsOutcome};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::exchange::plain;
use crate::tell;

#[derive(ClapArgs)]
struct Identity {
    /// Certificate chain, PEM.
    #[arg(long)]
    cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long)]
    key: Option<PathBuf>,
    /// TLS 1.2 alone.
    #[arg(long)]
    tls12: bool,
    /// Protocols to offer or accept.
    #[arg(long)]
    alpn: Vec<String>,
    /// Time limit for each read and write, in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    limit: u64,
}

#[derive(ClapArgs)]
pub struct Args {
    /// Destination.
    #[arg(long)]
    to: SocketAddr,
    #[command(flatten)]
    identity: Identity,
    /// What to send, before close_notify.
    #[arg(long, default_value = "")]
    text: String,
}

#[derive(ClapArgs)]
pub struct ServeArgs {
    /// Address and port.
    #[arg(long)]
    listen: SocketAddr,
    #[command(flatten)]
    identity: Identity,
}

/// One TLS connection.
pub fn run(args: &Args) -> Result<TlsOutcome> {
    let config = Arc::new(client(&args.identity)?);
    let stream = match connect(args) {
        Ok(stream) => stream,
        Err(error) => return Ok(TlsOutcome { error: Some(error.to_string()), ..nothing() }),
    };
    let name = ServerName::IpAddress(args.to.ip().into());
    let mut tls = StreamOwned::new(ClientConnection::new(config, name)?, stream);
    let mut outcome = nothing();
    if let Err(error) = talk(&mut tls, args, &mut outcome) {
        outcome.error = Some(error.to_string());
    }
    outcome.version = tls.conn.protocol_version().map(|version| format!("{version:?}"));
    outcome.alpn = tls.conn.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned());
    let leaf = tls.conn.peer_certificates().and_then(|chain| chain.first());
    outcome.peer_ids = leaf.and_then(uris).unwrap_or_default();
    outcome.peer_not_after = leaf.and_then(not_after);
    Ok(outcome)
}

fn connect(args: &Args) -> io::Result<TcpStream> {
    let limit = Duration::from_millis(args.identity.limit);
    let stream = TcpStream::connect_timeout(&args.to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

fn talk(tls: &mut StreamOwned<ClientConnection, TcpStream>, args: &Args, outcome: &mut TlsOutcome) -> io::Result<()> {
    while tls.conn.is_handshaking() {
        tls.conn.complete_io(&mut tls.sock)?;
    }
    outcome.handshake = true;
    tls.write_all(args.text.as_bytes())?;
    tls.conn.send_close_notify();
    tls.flush()?;
    tls.sock.shutdown(Shutdown::Write)?;
    let mut back = Vec::new();
    let result = tls.read_to_end(&mut back);
    outcome.text = String::from_utf8_lossy(&back).into_owned();
    result.map(|_| ())
}

fn nothing() -> TlsOutcome {
    TlsOutcome {
        handshake: false,
        version: None,
        alpn: None,
        peer_ids: Vec::new(),
        peer_not_after: None,
        text: String::new(),
        error: None,
    }
}

/// Asks for a client certificate, takes any, echoes.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let config = Arc::new(server(&args.identity)?);
    let listener = TcpListener::bind(args.listen)?;
    tell(&Event::Listening { local: plain(listener.local_addr()?) })?;
    std::thread::scope(|scope| {
        loop {
            let (stream, peer) = listener.accept()?;
            let config = Arc::clone(&config);
            scope.spawn(move || {
                if let Err(error) = echo(config, &args.identity, stream, plain(peer)) {
                    eprintln!("{peer}: {error:#}");
                }
            });
        }
    })
}

fn echo(config: Arc<ServerConfig>, how: &Identity, stream: TcpStream, peer: SocketAddr) -> Result<()> {
    tell(&Event::Accepted {
        peer,
        getpeername: stream.peer_addr().ok().map(plain),
        local: plain(stream.local_addr()?),
    })?;
    let limit = Some(Duration::from_millis(how.limit));
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    let mut tls = StreamOwned::new(ServerConnection::new(config)?, stream);
    let (mut received, mut buffer) = (0, vec![0; 16_384]);
    let end = loop {
        match tls.read(&mut buffer) {
            Ok(0) => break End::Eof,
            Ok(size) => {
                received += size as u64;
                tls.write_all(&buffer[..size])?;
            }
            Err(error) => {
                eprintln!("{peer}: {error}");
                break End::Error;
            }
        }
    };
    tls.conn.send_close_notify();
    let _ = tls.flush();
    tell(&Event::Closed { peer, received, sha256: String::new(), end })
}

fn client(how: &Identity) -> Result<ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let anybody = Arc::new(Anybody(Arc::clone(&provider)));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(how))?
        .dangerous()
        .with_custom_certificate_verifier(anybody);
    let mut config = match identity(how)? {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = how.alpn.iter().map(|name| name.clone().into_bytes()).collect();
    Ok(config)
}

fn server(how: &Identity) -> Result<ServerConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let anybody = Arc::new(Anybody(Arc::clone(&provider)));
    let (chain, key) = identity(how)?.context("a server needs --cert and --key")?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(how))?
        .with_client_cert_verifier(anybody)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = how.alpn.iter().map(|name| name.clone().into_bytes()).collect();
    Ok(config)
}

fn versions(how: &Identity) -> [&'static SupportedProtocolVersion; 1] {
    [if how.tls12 { &version::TLS12 } else { &version::TLS13 }]
}

fn identity(how: &Identity) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>> {
    let (Some(cert), Some(key)) = (&how.cert, &how.key) else { return Ok(None) };
    let chain = CertificateDer::pem_slice_iter(&fs::read(cert)?).collect::<Result<_, _>>()?;
    Ok(Some((chain, PrivateKeyDer::from_pem_slice(&fs::read(key)?)?)))
}

fn uris(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??.value.general_names.clone();
    let uri = |name: &GeneralName<'_>| if let GeneralName::URI(uri) = name { Some((*uri).to_owned()) } else { None };
    Some(names.iter().filter_map(uri).collect())
}

fn not_after(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// Trusts every certificate, as long as its owner signs the handshake.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl Anybody {
    fn signed13(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn signed12(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed12(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed13(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Anybody {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed12(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed13(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}
