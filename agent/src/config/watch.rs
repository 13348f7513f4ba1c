//! Word of a changed file, or of SIGHUP. Whoever receives it loads the file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Editors and ConfigMaps change a file in several steps within a few milliseconds.
const SETTLE: Duration = Duration::from_millis(100);

/// A directory that never comes to rest must not hide a change for longer.
const LATEST: Duration = Duration::from_secs(1);

/// Why the file should be loaded again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// Its content changed, or it came or went.
    FileChanged,
    /// SIGHUP.
    Signal,
}

/// Why a file cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// inotify refused.
    #[error("cannot watch the directory of {}", file.display())]
    Directory {
        /// The file.
        file: PathBuf,
        /// What inotify said.
        source: notify::Error,
    },
    /// The handler of SIGHUP could not be set.
    #[error("cannot handle SIGHUP")]
    Signal(#[source] std::io::Error),
}

/// Watches `file` until the receiver is dropped. Must be called within a tokio runtime, and before the file is loaded for
/// the first time: a change in between is missed otherwise.
///
/// It is the directory that is watched, so that a file that is replaced (by an editor's rename, or as Kubernetes swaps the
/// `..data` link of a ConfigMap) is followed. Where `file` is itself a link, the directory of its target at the time of
/// the call is watched too.
///
/// # Errors
/// Where the directory cannot be watched or SIGHUP not be handled.
pub fn watch(file: &Path) -> Result<mpsc::Receiver<Reload>, WatchError> {
    let hangup = signal(SignalKind::hangup()).map_err(WatchError::Signal)?;
    // One word waiting is as good as many: the content is compared afterwards.
    let (touched, touches) = mpsc::channel(1);
    let on_event = move |event: notify::Result<notify::Event>| {
        // An error (an overflow) may hide a change.
        if event.map_or(true, |event| may_change(event.kind)) {
            let _ = touched.try_send(());
        }
    };
    let fail = |source| WatchError::Directory { file: file.into(), source };
    let mut watcher = notify::recommended_watcher(on_event).map_err(fail)?;
    for directory in directories(file) {
        watcher.watch(&directory, RecursiveMode::NonRecursive).map_err(fail)?;
    }
    let (reloads, receiver) = mpsc::channel(8);
    let content = std::fs::read(file).ok();
    let follow = Follow { file: file.into(), content, touches, hangup, reloads, _watcher: watcher };
    tokio::spawn(follow.run());
    Ok(receiver)
}

struct Follow {
    file: PathBuf,
    content: Option<Vec<u8>>,
    touches: mpsc::Receiver<()>,
    hangup: Signal,
    reloads: mpsc::Sender<Reload>,
    _watcher: RecommendedWatcher,
}

impl Follow {
    async fn run(mut self) {
        // When to look, and when at the latest, once something was touched.
        let mut look: Option<(Instant, Instant)> = None;
        loop {
            let due = look.map_or_else(Instant::now, |(settled, latest)| settled.min(latest));
            let reload = tokio::select! {
                () = self.reloads.closed() => return,
                Some(()) = self.touches.recv() => {
                    let now = Instant::now();
                    look = Some((now + SETTLE, look.map_or(now + LATEST, |(_, latest)| latest)));
                    None
                }
                Some(()) = self.hangup.recv() => Some(Reload::Signal),
                () = sleep_until(due), if look.is_some() => {
                    look = None;
                    self.content_changed().then_some(Reload::FileChanged)
                }
            };
            if let Some(reload) = reload
                && self.reloads.send(reload).await.is_err()
            {
                return;
            }
        }
    }

    /// Other files of the directory, and a file written again as it was, are no news.
    fn content_changed(&mut self) -> bool {
        let content = std::fs::read(&self.file).ok();
        std::mem::replace(&mut self.content, content) != self.content
    }
}

/// The directory of the file, and that of its target where it is a link.
fn directories(file: &Path) -> Vec<PathBuf> {
    let parent = |file: &Path| match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        Some(_) | None => PathBuf::from("."),
    };
    let own = parent(file);
    let target = file.canonicalize().ok().map(|target| parent(&target));
    let elsewhere = target.filter(|target| own.canonicalize().ok().as_ref() != Some(target));
    [own].into_iter().chain(elsewhere).collect()
}

/// Reading is no change (our own would wake us again), and writing becomes one when the file is closed: half a file may
/// well be a valid one that lacks its policies.
fn may_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        EventKind::Modify(kind) => !matches!(kind, ModifyKind::Data(_)),
        EventKind::Any | EventKind::Create(_) | EventKind::Remove(_) | EventKind::Other => true,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Far above what any step takes; only a failing test waits so long.
    const DEADLINE: Duration = Duration::from_secs(10);

    /// The file's next change, within `bound`. Another test's SIGHUP reaches every watcher of the process.
    async fn changed(reloads: &mut mpsc::Receiver<Reload>, bound: Duration) -> bool {
        let change = async { while reloads.recv().await.expect("the watcher ended") != Reload::FileChanged {} };
        tokio::time::timeout(bound, change).await.is_ok()
    }

    #[tokio::test]
    async fn follows_writes_and_renames() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sealane.yaml");
        fs::write(&file, "a").unwrap();
        let mut reloads = watch(&file).unwrap();

        fs::write(&file, "b").unwrap();
        assert!(changed(&mut reloads, DEADLINE).await);
        let other = dir.path().join("new");
        fs::write(&other, "c").unwrap();
        fs::rename(&other, &file).unwrap();
        assert!(changed(&mut reloads, DEADLINE).await);
        fs::remove_file(&file).unwrap();
        assert!(changed(&mut reloads, DEADLINE).await);
        fs::write(&file, "d").unwrap();
        assert!(changed(&mut reloads, DEADLINE).await);
    }

    #[tokio::test]
    async fn follows_the_swapped_link_of_a_config_map() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (version, content) in [("..1", "a"), ("..2", "b")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("sealane.yaml"), content).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/sealane.yaml", at("sealane.yaml")).unwrap();
        let mut reloads = watch(&at("sealane.yaml")).unwrap();

        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        fs::remove_dir_all(at("..1")).unwrap();
        assert!(changed(&mut reloads, DEADLINE).await);
    }

    #[tokio::test]
    async fn follows_a_link_to_another_directory() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (link, target) = (dir.path().join("sealane.yaml"), elsewhere.path().join("target.yaml"));
        fs::write(&target, "a").unwrap();
        symlink(&target, &link).unwrap();
        let mut reloads = watch(&link).unwrap();
        fs::write(&target, "b").unwrap();
        assert!(changed(&mut reloads, DEADLINE).await);
    }

    #[tokio::test]
    async fn what_does_not_change_the_file_is_no_news() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sealane.yaml");
        fs::write(&file, "a").unwrap();
        let mut reloads = watch(&file).unwrap();

        fs::write(dir.path().join("other"), "x").unwrap();
        fs::write(&file, "a").unwrap();
        // The watcher has settled long before this, so a word about those writes would have come.
        assert!(!changed(&mut reloads, LATEST + SETTLE).await);
        fs::write(&file, "b").unwrap();
        assert!(changed(&mut reloads, DEADLINE).await);
    }

    #[tokio::test]
    async fn sighup_reloads_an_unchanged_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sealane.yaml");
        let mut reloads = watch(&file).unwrap();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGHUP).unwrap();
        let reload = tokio::time::timeout(DEADLINE, reloads.recv()).await.expect("no reload");
        assert_eq!(reload, Some(Reload::Signal));
    }

    #[tokio::test]
    async fn a_missing_directory_is_an_error() {
        let error = watch(Path::new("/nonexistent/sealane.yaml")).unwrap_err();
        assert_eq!(error.to_string(), "cannot watch the directory of /nonexistent/sealane.yaml");
    }
}
