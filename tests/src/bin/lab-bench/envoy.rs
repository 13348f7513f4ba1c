//! A pair of Envoy sidecars with mutual TLS, the way that most meshes have it: the client's dials the server's.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;
use sealane_tests::ca::{Ca, Svid};
use sealane_tests::config::{TRUST_DOMAIN, spiffe_id};
use sealane_tests::pod::Pod;
use serde_json::{Value, json};

use crate::site::{Daemon, PORT, Site};

/// Where the server's sidecar takes TLS.
pub const TLS_PORT: u16 = 9443;
const CLIENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9080);
const WORKERS: &str = "2";

/// Starts both; yields where the client shall connect to.
pub fn pair(binary: &Path, site: &Site) -> Result<([Daemon; 2], SocketAddr)> {
    let ca = Ca::new(TRUST_DOMAIN)?;
    let (web, api) = (ca.svid("web")?, ca.svid("api")?);
    let app = SocketAddr::from(([127, 0, 0, 1], PORT));
    let inbound = site.server.at(TLS_PORT);
    let server = json!({
        "listener": listener(inbound, Some(tls(site, "api", &api, "web", Side::Downstream)?)),
        "cluster": cluster(app, None),
    });
    let client = json!({
        "listener": listener(CLIENT, None),
        "cluster": cluster(inbound, Some(tls(site, "web", &web, "api", Side::Upstream)?)),
    });
    let daemons = [start(binary, site, &site.client, &client)?, start(binary, site, &site.server, &server)?];
    Ok((daemons, CLIENT))
}

fn start(binary: &Path, site: &Site, pod: &Pod, parts: &Value) -> Result<Daemon> {
    let config = json!({ "static_resources": { "listeners": [parts["listener"]], "clusters": [parts["cluster"]] } });
    let file = site.lab.dir().join(format!("envoy-{}.json", pod.name));
    fs::write(&file, config.to_string())?;
    let mut envoy = pod.command(binary);
    envoy.arg("--config-path").arg(file).args(["--concurrency", WORKERS, "--log-level", "error"]);
    Daemon::start({
        envoy.arg("--disable-hot-restart");
        envoy
    })
}

fn listener(at: SocketAddr, transport_socket: Option<Value>) -> Value {
    let proxy = json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "bench",
            "cluster": "next",
        },
    });
    let mut chain = json!({ "filters": [proxy] });
    if let Some(transport_socket) = transport_socket {
        chain["transport_socket"] = transport_socket;
    }
    json!({ "name": "listener", "address": address(at), "filter_chains": [chain] })
}

fn cluster(to: SocketAddr, transport_socket: Option<Value>) -> Value {
    let endpoint = json!({ "endpoint": { "address": address(to) } });
    let mut cluster = json!({
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": { "cluster_name": "next", "endpoints": [{ "lb_endpoints": [endpoint] }] },
    });
    if let Some(transport_socket) = transport_socket {
        cluster["transport_socket"] = transport_socket;
    }
    cluster
}

fn address(at: SocketAddr) -> Value {
    json!({ "socket_address": { "address": at.ip().to_string(), "port_value": at.port() } })
}

#[derive(Clone, Copy)]
enum Side {
    Downstream,
    Upstream,
}

/// TLS 1.3 with the other's SPIFFE ID demanded; for all else Envoy's defaults, session resumption among them.
fn tls(site: &Site, name: &str, svid: &Svid, peer: &str, side: Side) -> Result<Value> {
    let (chain, key) = svid.write_pair(&site.lab.dir(), name)?;
    let bundle = site.lab.dir().join(format!("{name}.bundle"));
    fs::write(&bundle, &svid.bundle)?;
    let common = json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{ "certificate_chain": { "filename": chain }, "private_key": { "filename": key } }],
        "validation_context": {
            "trusted_ca": { "filename": bundle },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": spiffe_id(peer) } }],
        },
    });
    let (kind, config) = match side {
        Side::Downstream => {
            ("DownstreamTlsContext", json!({ "common_tls_context": common, "require_client_certificate": true }))
        }
        Side::Upstream => ("UpstreamTlsContext", json!({ "common_tls_context": common })),
    };
    let mut config = config;
    config["@type"] = json!(format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}"));
    Ok(json!({ "name": "envoy.transport_sockets.tls", "typed_config": config }))
}
