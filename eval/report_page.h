// What every report page carries: its style sheet and the small script that shows values under the pointer.
#pragma once

namespace longhand {

// Series colours s0..s7 keep a contrast of 3:1 and more against the background in both modes and stay apart for colour-blind readers.
inline constexpr const char* kReportStyle = R"css(
:root{--bg:#fff;--card:#fff;--ink:#1b1f24;--soft:#57606a;--rule:#d8dee4;--grid:#e9edf1;--note:#fff6dd;--note-rule:#c9a227;
--s0:#0b5fa5;--s1:#c8480c;--s2:#12784a;--s3:#84379c;--s4:#8a6a00;--s5:#0c7d8a;--s6:#b3174f;--s7:#4c5561}
@media (prefers-color-scheme:dark){:root{--bg:#0f1318;--card:#151a21;--ink:#e6eaef;--soft:#a3adb8;--rule:#313a45;--grid:#242c35;--note:#2c2510;--note-rule:#b8952a;
--s0:#62aef0;--s1:#ff9457;--s2:#5cc891;--s3:#cf93e6;--s4:#dcbb4a;--s5:#5bcbd8;--s6:#ff85ad;--s7:#b4bec9}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1100px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 6px}
p{margin:6px 0}
.soft,figcaption p{color:var(--soft)}
.note{background:var(--note);border-left:4px solid var(--note-rule);padding:10px 14px;margin:18px 0;overflow-wrap:anywhere}
.note ul{margin:4px 0;padding-left:20px}
figure{margin:0}
figcaption{margin-bottom:6px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 20px;margin:8px 0 2px;padding:0}
.legend li{overflow-wrap:anywhere}
.legend svg{vertical-align:middle;margin-right:5px}
.scroll{overflow-x:auto}
.box{position:relative;min-width:600px}
svg.plot{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{fill:var(--ink);font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
svg .ticks text,svg .tick{fill:var(--soft);font-size:12.5px;font-variant-numeric:tabular-nums}
svg .cell{font-size:12px}
.grid line{stroke:var(--grid);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.marker{stroke:var(--soft);stroke-width:1.3;stroke-dasharray:2 3}
svg .marker-label{font-size:12px;fill:var(--ink);paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.cursor{stroke:var(--soft);stroke-width:1}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}.s5{stroke:var(--s5)}.s6{stroke:var(--s6)}.s7{stroke:var(--s7)}
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}.f4{fill:var(--s4)}.f5{fill:var(--s5)}.f6{fill:var(--s6)}.f7{fill:var(--s7)}
.tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--rule);border-radius:6px;box-shadow:0 3px 12px rgba(0,0,0,.18);padding:6px 10px;font-size:13px;
font-variant-numeric:tabular-nums;white-space:nowrap;z-index:2}
.tip b{display:block}
.tip i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
table{border-collapse:collapse;min-width:min(100%,460px);margin:8px 0 0;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left;padding-left:2px}
thead th{border-bottom:2px solid var(--rule);font-weight:600;vertical-align:bottom}
thead th:not(:first-child){min-width:5.6em;text-wrap:balance}
tbody th{font-weight:400;white-space:nowrap}
.text th,.text td{text-align:left;overflow-wrap:break-word}
td{white-space:nowrap}
.text td{white-space:normal;min-width:7em;overflow-wrap:anywhere}
.names th:nth-child(-n+3),.names td:nth-child(-n+3){text-align:left}
.names thead th{min-width:0}
details{margin-top:8px}
summary{cursor:pointer;color:var(--soft)}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;--grid:#e4e4e4;
--s0:#0b5fa5;--s1:#c8480c;--s2:#12784a;--s3:#84379c;--s4:#8a6a00;--s5:#0c7d8a;--s6:#b3174f;--s7:#4c5561}
main{max-width:none;padding:0}h2{break-after:avoid}figure,table{break-inside:avoid}.scroll{overflow:visible}table{font-size:9.5px;min-width:0}
th,td,tbody th{padding:2px 4px;white-space:normal}thead th:not(:first-child),.text td{min-width:0}.tip,.cursor{display:none}.box{min-width:0}}
)css";

// For each line plot: a cursor at the pointer's x and a box with the value of every series at its nearest point.
inline constexpr const char* kReportScript = R"js(
'use strict';
const readable=v=>{const a=Math.abs(v);if(a!==0&&(a<1e-3||a>=1e9))return v.toPrecision(4);
return a>=999.5?Math.round(v).toLocaleString('en-US'):String(Number(v.toPrecision(5)))};
for(const svg of document.querySelectorAll('svg.plot[data-area]')){
 const [left,right,top,bottom]=svg.dataset.area.split(' ').map(Number),[low,high]=svg.dataset.xrange.split(' ').map(Number);
 const f=svg.dataset.xscale==='log'?Math.log:v=>v;
 const at=x=>left+(f(x)-f(low))/(f(high)-f(low))*(right-left);
 const lines=[...svg.querySelectorAll('path[data-points]')].map(p=>({name:p.dataset.name,color:p.dataset.color,
  points:p.dataset.points.split(' ').map(t=>t.split(',').map(Number)).map(([x,y])=>({x,y,at:at(x)}))}));
 const label=svg.querySelector('.axis-label').textContent;
 const cursor=document.createElementNS(svg.namespaceURI,'line');
 cursor.setAttribute('class','cursor');cursor.setAttribute('y1',top);cursor.setAttribute('y2',bottom);
 const tip=document.createElement('div');tip.className='tip';tip.hidden=true;svg.parentNode.append(tip);
 const hide=()=>{tip.hidden=true;cursor.remove()};
 svg.addEventListener('pointerleave',hide);
 svg.addEventListener('pointermove',e=>{
  const frame=svg.getBoundingClientRect(),unit=svg.viewBox.baseVal.width/frame.width,px=(e.clientX-frame.left)*unit;
  if(px<left-8||px>right+8)return hide();
  const near=lines.map(l=>{let a=0,b=l.points.length-1;while(b-a>1){const m=a+b>>1;if(l.points[m].at<px)a=m;else b=m}
   return{line:l,point:px-l.points[a].at<l.points[b].at-px?l.points[a]:l.points[b]}}).sort((a,b)=>Math.abs(a.point.at-px)-Math.abs(b.point.at-px));
  const x=near[0].point.at;
  cursor.setAttribute('x1',x);cursor.setAttribute('x2',x);svg.append(cursor);
  tip.replaceChildren();
  const head=document.createElement('b');head.textContent=label.split(/[:(]/)[0].trim()+' '+readable(near[0].point.x);tip.append(head);
  for(const n of near.filter(n=>Math.abs(n.point.at-x)<24).sort((a,b)=>b.point.y-a.point.y)){
   const row=document.createElement('div'),dot=document.createElement('i');dot.style.background='var(--s'+n.line.color+')';
   row.append(dot,n.line.name+': '+readable(n.point.y));tip.append(row)}
  tip.hidden=false;
  const width=tip.offsetWidth,cx=x/unit;
  tip.style.left=(cx+14+width>frame.width?Math.max(0,cx-14-width):cx+14)+'px';
  tip.style.top=Math.max(0,(e.clientY-frame.top)-tip.offsetHeight-10)+'px';
 });
}
)js";

}  // namespace longhand
