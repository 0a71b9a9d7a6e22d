// The panel "Operate": what /metrics says, in a few words.

import { metrics } from "./api.js";
import { byId, element } from "./dom.js";

// Sums of all samples by name, as `prophy_jobs{status="queued"}` or without labels.
function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (found) samples.push({ name: found[1], labels: found[2] ?? "", value: Number(found[3]) });
  }
  return (name, label = "") =>
    samples.filter((s) => s.name === name && s.labels.includes(label)).reduce((sum, s) => sum + s.value, 0);
}

export async function showStatus() {
  const sum = parse(await metrics());
  const made = sum("prophy_stage_seconds_count", 'stage="denoise"');
  const lines = {
    "Replicas": sum("prophy_replicas"),
    "Queued": sum("prophy_jobs", 'status="queued"'),
    "In progress": sum("prophy_jobs", 'status="in_progress"'),
    "Made since the start": made,
    "Seconds per video": made ? (sum("prophy_stage_seconds_sum") / made).toFixed(1) : "none made yet",
    "Failed": sum("prophy_videos_failed_total"),
    "Begun again on another replica": sum("prophy_videos_requeued_total"),
    "Requests refused or failed": sum("prophy_http_errors_total"),
  };
  byId("status").replaceChildren(...Object.entries(lines).flatMap(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, String(value))]));
}
