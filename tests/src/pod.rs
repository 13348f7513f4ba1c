//! Pods: a network namespace with `eth0`, and a cgroup below the node's pods.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

use crate::cgroup::Cgroup;
use crate::lab::{Node, command};
use crate::netns::Netns;
use crate::poll;
use crate::report::{Event, Outcome};

/// How long a program inside a pod has to come up.
const START: Duration = Duration::from_secs(10);

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
        let mut serve = self.command(binary("testpod")?);
        serve.args(["serve", "--listen", listen]).args(args);
        let server = Server::start(serve)?;
        let up = server.wait(START, |event| matches!(event, Event::Listening { .. }));
        up.with_context(|| format!("{}: testpod serve does not listen on {listen}", self.name))?;
        Ok(server)
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
        let mut command = self.command(binary("testpod")?);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(Running { child: Some(command.spawn().context("cannot run testpod")?), what: args.join(" ") })
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // The name is free for the next pod at once, while the kernel takes its time over the namespace. A lab that is
        // gone already has taken its links along.
        let _ = self.node.netns.ip(&format!("link del {}\n", self.veth));
    }
}

/// A `testpod` that will print one JSON result.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    what: String,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Waits for the result; the program's own time limits bound it.
    pub fn result<T: DeserializeOwned>(mut self) -> Result<T> {
        let out = self.child.take().context("already taken")?.wait_with_output()?;
        let text = String::from_utf8_lossy(&out.stdout);
        ensure!(out.status.success(), "testpod {}: {}, {text}", self.what, out.status);
        serde_json::from_str(text.trim()).with_context(|| format!("testpod {}: {text:?}", self.what))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

/// A `testpod serve` and what it has told so far; dropping it kills the process.
#[derive(Debug)]
pub struct Server {
    child: Child,
    lines: Mutex<(Receiver<Event>, Vec<Event>)>,
}

impl Server {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run testpod")?;
        let out = BufReader::new(child.stdout.take().context("no stdout")?);
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    // Nobody listens any more: only the pipe must stay empty.
                    Ok(event) => drop(sender.send(event)),
                    Err(error) => eprintln!("testpod serve: {error}: {line}"),
                }
            }
        });
        Ok(Self { child, lines: Mutex::new((receiver, Vec::new())) })
    }

    /// Everything that it has told so far.
    pub fn events(&self) -> Vec<Event> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let (receiver, seen) = &mut *lines;
        seen.extend(receiver.try_iter());
        seen.clone()
    }

    /// Waits for the first event, old or new, that `matches`.
    pub fn wait(&self, within: Duration, matches: impl Fn(&Event) -> bool) -> Result<Event> {
        let found = poll::until("the server's event", within, || self.events().into_iter().find(&matches));
        found.with_context(|| format!("events: {:?}", self.events()))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// A binary of this workspace, beside the one that runs (tests run from `deps/` below it).
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    beside.with_context(|| format!("{name} is not built beside {}", own.display()))
}
