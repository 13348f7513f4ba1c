//! Pods: a network namespace with `eth0`, and a cgroup below the node's pods.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use crate::cgroup::Cgroup;
use crate::lab::{Node, command};
use crate::netns::Netns;
use crate::report::Outcome;
use crate::testpod::{Running, Server, binary};

/// A pod; dropping it is the pod's deletion.
#[derive(Debug)]
pub struct Pod {
    /// Unique on its node.
    pub name: String,
    /// Its version 4 address.
    pub v4: Ipv4Addr,
    /// Its version 6 address.
    pub v6: Ipv6Addr,
    /// Its namespace.
    pub netns: Netns,
    /// The node that it runs on.
    pub node: Arc<Node>,
    /// The node's end of `eth0`.
    pub veth: String,
    cgroup: Cgroup,
}

impl Pod {
    pub(crate) fn new(node: Arc<Node>, name: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Self> {
        let cgroup = Cgroup::new(node.pods.join(name))?;
        let netns = Netns::new(&format!("{}-{name}", node.netns.name()))?;
        let veth = format!("pod{}", v4.octets()[3]);
        node.netns.ip(&format!(
            "link add {veth} mtu 1500 type veth peer name eth0 mtu 1500 netns {}
             link set {veth} up
             addr add 169.254.1.1/32 dev {veth}
             addr add fe80::1/64 dev {veth} nodad\n",
            netns.name()
        ))?;
        netns.ip(&format!(
            "link set eth0 up
             addr add {v4}/32 dev eth0
             addr add {v6}/128 dev eth0 nodad
             route add 169.254.1.1 dev eth0 scope link
             route add default via 169.254.1.1 dev eth0
             route add ::/0 via fe80::1 dev eth0\n"
        ))?;
        node.netns
            .ip(&format!("route add {v4} dev {veth} src {}\n route add {v6} dev {veth} src {}\n", node.v4, node.v6))?;
        Ok(Self { name: name.to_owned(), v4, v6, netns, node, veth, cgroup })
    }

    /// Its version 4 address with a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.v4), port)
    }

    /// Its version 6 address with a port.
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.v6), port)
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// A command that will run inside the pod.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        command(self.cgroup.path(), &self.netns, program.as_ref())
    }

    /// `testpod serve` on `[::]:port` (both families); returns once it listens. `args`: see `testpod serve --help`.
    pub fn serve(&self, port: u16, args: &[&str]) -> Result<Server> {
        self.serve_at(&format!("[::]:{port}"), args)
    }

    /// `testpod serve` on an address of choice.
    pub fn serve_at(&self, listen: &str, args: &[&str]) -> Result<Server> {
        Server::start(self.command(binary("testpod")?), "serve", listen, args).with_context(|| self.name.clone())
    }

    /// `testpod connect`, to its end. `args`: see `testpod connect --help`.
    pub fn connect(&self, to: SocketAddr, args: &[&str]) -> Result<Outcome> {
        self.testpod(&[&["connect", "--to", &to.to_string()], args].concat())
    }

    /// Any other subcommand of `testpod` that prints one JSON result.
    pub fn testpod<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T> {
        self.start_testpod(args)?.result()
    }

    /// The same, in the background.
    pub fn start_testpod(&self, args: &[&str]) -> Result<Running> {
        Running::start(self.command(binary("testpod")?), args)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // The name is free for the next pod at once, while the kernel takes its time over the namespace. A lab that is
        // gone already has taken its links along.
        let _ = self.node.netns.ip(&format!("link del {}\n", self.veth));
    }
}
