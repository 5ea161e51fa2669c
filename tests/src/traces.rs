//! The traces of a pod's capture, in the pod's namespace and on its node.

use std::fs;
use std::path::{Path, PathBuf};

use crate::netns::has_ipv6;
use crate::process::output;
use crate::{Pod, World, bpf};

impl Pod {
    /// Returns the traces in its namespace: rules, routes, settings and listeners.
    pub fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        let families = ["-4", "-6"].into_iter();
        for family in families.take(if has_ipv6() { 2 } else { 1 }) {
            let rules = self.netns.show(&format!("{family} rule show"));
            let ours = rules.lines().filter(|rule| rule.contains("fwmark"));
            traces.extend(ours.map(|rule| format!("{family} rule {rule}")));
            let routes = self.netns.show(&format!("{family} route show table all"));
            let ours = |route: &&str| {
                let tables = ["table 15001", "table 15006"];
                tables.iter().any(|table| route.contains(table))
            };
            traces.extend(routes.lines().filter(ours).map(str::to_owned));
        }
        let settings = [
            "net.ipv4.tcp_fwmark_accept",
            "net.ipv4.fwmark_reflect",
            "net.ipv6.fwmark_reflect",
        ];
        for name in settings.into_iter().take(if has_ipv6() { 3 } else { 2 }) {
            if self.netns.sysctl(name) != "0" {
                traces.push(format!("{name} is not 0"));
            }
        }
        let (status, listeners, error) = output(self.command("ss").args(["-Hltn"]));
        assert!(status.success(), "ss: {error}");
        let ours = |line: &&str| {
            [":15001", ":15006", ":15008"]
                .iter()
                .any(|port| line.contains(port))
        };
        traces.extend(listeners.lines().filter(ours).map(str::to_owned));
        traces
    }
}

impl World {
    /// Returns all pins and their folders.
    pub fn pins(&self) -> Vec<PathBuf> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                // The kernel's own two files have a dot in their names.
                if path.is_dir() {
                    walk(&path, found);
                    found.push(path);
                } else if path.extension().is_none() {
                    found.push(path);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.bpffs(), &mut found);
        found
    }

    /// Returns the traces of a node's pods: pins, entries of maps, the records of what was changed, and
    /// those that tell other nodes that the pods can be dialled.
    pub fn traces(&self, node: &str) -> Vec<String> {
        let mut traces = Vec::new();
        let below = self.bpffs().join("dataplane").join(node);
        for pin in self.pins() {
            let Ok(own) = pin.strip_prefix(&below) else {
                continue;
            };
            let name = own.file_name().unwrap_or_default();
            if own.components().any(|part| part.as_os_str() == "pods") && name != "pods" {
                traces.push(pin.display().to_string());
            } else if pin.is_file() {
                let keys = bpf::keys(&pin).unwrap_or_default();
                traces.extend(keys.iter().map(|key| format!("{name:?} has {key:x?}")));
            }
        }
        let files = |folder: PathBuf| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path())
        };
        let records = files(self.folder().join("run").join(node).join("pods"));
        traces.extend(records.map(|path| path.display().to_string()));
        let said = files(self.state.join("enrolled")).filter(|path| {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.contains(&format!("\"node\":\"{node}\""))
        });
        traces.extend(said.map(|path| path.display().to_string()));
        traces
    }
}
